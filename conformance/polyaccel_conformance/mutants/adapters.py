"""Wrong LoRA operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from polyaccel.backend import AdapterRows, Backend, Step, Weight
from polyaccel_conformance.mutants.mutant import Function, Mutant, mutant, redeclared, undisguised
from polyaccel_conformance.mutants.sequences import restep

Tensor = torch.Tensor


def _rows(edit: Any) -> Any:
    """The host's sgmv on other triples; None leaves the call as it is."""

    def wrap(fn: Function) -> Function:
        def sgmv(y: Tensor, x: Tensor, weight: Weight, step: Step, row_set: Any = "tokens") -> Tensor:
            changed = edit(step.input.rows(row_set), weight, step)
            if changed is None:
                return fn(y, x, weight, step, row_set)  # type: ignore[no-any-return]
            inputs = replace(step.input, adapters={**step.input.adapters, row_set: changed})
            return fn(y, x, weight, restep(step, inputs), row_set)  # type: ignore[no-any-return]

        return sgmv

    return wrap


def _largest(weight: Weight, step: Step, slot: int) -> int:
    store = step.state.adapters
    assert store is not None
    count = len(weight.spec.slices)
    return max(store.true_rank(weight.spec.site, i, slot) for i in range(count)) if slot < store.slots else 0


def _whole_mix(rows: AdapterRows, weight: Weight, step: Step) -> AdapterRows | None:
    return AdapterRows.build(rows.rows, rows.slots, np.ones_like(rows.weights)) if len(rows) else None


def _without(rows: AdapterRows, drop: Any) -> AdapterRows | None:
    if not drop.any():
        return None
    return AdapterRows.build(rows.rows[~drop], rows.slots[~drop], rows.weights[~drop])


def _last_slot(rows: AdapterRows, weight: Weight, step: Step) -> AdapterRows | None:
    store = step.state.adapters
    return None if store is None else _without(rows, rows.slots == store.slots - 1)


def _rank_one(rows: AdapterRows, weight: Weight, step: Step) -> AdapterRows | None:
    slots = set(rows.slots.tolist())
    alone = bool(slots) and all(_largest(weight, step, slot) == 1 for slot in slots)
    return _without(rows, np.ones(len(rows), dtype=np.bool_)) if alone else None


def _boundary(rows: AdapterRows, weight: Weight, step: Step) -> AdapterRows | None:
    """The last row of each of several segments goes with the next one."""
    if len(rows.segment_slots) < 2:
        return None
    slots = rows.slots.copy()
    for end, following in zip(rows.starts[1:-1], rows.segment_slots[1:], strict=True):
        slots[end - 1] = following
    return AdapterRows.build(rows.rows, slots, rows.weights)


def _gap_rows(rows: AdapterRows, weight: Weight, step: Step) -> AdapterRows | None:
    """Rows without an adapter get the first one's."""
    if not len(rows):
        return None
    missing = np.setdiff1d(np.arange(rows.rows.max() + 1), rows.rows).astype(np.int32)
    if not len(missing):
        return None
    return AdapterRows.build(
        np.concatenate((rows.rows, missing)),
        np.concatenate((rows.slots, np.full(len(missing), rows.slots[0], dtype=rows.slots.dtype))),
        np.concatenate((rows.weights, np.ones(len(missing), dtype=np.float32))),
    )


def _sgmv_low(fn: Function) -> Function:
    def sgmv(y: Tensor, x: Tensor, weight: Weight, step: Step, row_set: Any = "tokens") -> Tensor:
        """float32 rows are rounded to bfloat16 before the shrink."""
        low = x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x
        return fn(y, low, weight, step, row_set)  # type: ignore[no-any-return]

    return sgmv


def _falls_back(inner: Backend, hard: Callable[[int, Weight], bool]) -> Backend:
    """A native sgmv that runs the composite inside for what its kernel cannot do."""

    def wrap(fn: Function) -> Function:
        def sgmv(y: Tensor, x: Tensor, weight: Weight, step: Step, row_set: Any = "tokens") -> Any:
            slots = set(step.input.rows(row_set).slots.tolist())
            if any(hard(_largest(weight, step, slot), weight) for slot in slots):
                return inner.composites()["sgmv"](y, x, weight, step, row_set)
            return fn(y, x, weight, step, row_set)

        return sgmv

    return undisguised(inner, "sgmv", wrap)


def _not_sixteen(rank: int, weight: Weight) -> bool:
    return rank % 16 != 0


def _narrow_slice(rank: int, weight: Weight) -> bool:
    return any(part.n < rank for part in weight.spec.slices)


def _up_to_16(query: Any) -> list[str]:
    rank = query.integer("largest_rank")
    return [f"largest rank {rank}; the kernel takes 16"] if rank > 16 else []


ADAPTERS: tuple[Mutant, ...] = (
    Mutant(
        name="sgmv.falls_back_unless_16",
        what="The founding case: the composite runs inside where the rank is no multiple of 16.",
        operators=("sgmv",),
        check="evidence.native",
        apply=lambda inner: _falls_back(inner, _not_sixteen),
    ),
    Mutant(
        name="sgmv.falls_back_narrow_slice",
        what="The composite runs inside where a slice is narrower than the rank.",
        operators=("sgmv",),
        check="evidence.native",
        apply=lambda inner: _falls_back(inner, _narrow_slice),
    ),
    mutant("sgmv.mix_ignored", "Mix weights are taken to be 1.", "values.exact", sgmv=_rows(_whole_mix)),
    mutant("sgmv.last_slot", "The last slot's rows get no delta.", "values.bound", sgmv=_rows(_last_slot)),
    mutant(
        "sgmv.rank_one",
        "A step whose adapters are all of rank 1 gets no delta.",
        "values.bound",
        narrow=True,
        sgmv=_rows(_rank_one),
    ),
    mutant(
        "sgmv.segment_boundary",
        "The last row of a segment uses the next segment's adapter.",
        "values.exact",
        sgmv=_rows(_boundary),
    ),
    mutant(
        "sgmv.base_rows", "Rows without an adapter get the first one's delta.", "values.exact", sgmv=_rows(_gap_rows)
    ),
    mutant("sgmv.low_shrink", "float32 rows are rounded to bfloat16 first.", "values.bound", sgmv=_sgmv_low),
    Mutant(
        name="sgmv.refuses_hard_ranks",
        what="Ranks above 16 are refused, so that the composite serves them.",
        operators=("sgmv",),
        check="lora.native_evidence",
        apply=redeclared("sgmv", supports=_up_to_16),
    ),
)
