"""Adapters on linear layers, segment by segment (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

Every product is kept in float32, h included; y is rounded once, after all of its row's adapters were added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from polyaccel.backend.adapter_store import AdapterStore
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.step import AdapterRows, RowSet, Step
from polyaccel.backend.weight import Weight, WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Triples ``start:end`` of a row set, all of one slot.

    Attributes:
        rows: ``[end - start]`` int64 on the device.
        run: the rows as a slice where they are consecutive, else None.
        mix: ``[end - start, 1]`` float32 on the device, None where all are 1.
    """

    slot: int
    start: int
    end: int
    rows: torch.Tensor
    run: slice | None
    mix: torch.Tensor | None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """This segment's rows of ``x: [rows, ...]``: a view where they are consecutive."""
        return x.index_select(0, self.rows) if self.run is None else x[self.run]

    def add(self, y: torch.Tensor, delta: torch.Tensor) -> None:
        """Add ``delta`` to this segment's rows of ``y``, in place; a row that appears twice gets both."""
        if self.run is None:
            y.index_add_(0, self.rows, delta)
        else:
            y[self.run].add_(delta)

    def weigh(self, h: torch.Tensor) -> torch.Tensor:
        """``h: [end - start, ...]`` times each triple's mix weight."""
        return h if self.mix is None else h * self.mix


def segments(step: Step, row_set: RowSet) -> Iterator[Segment]:
    """The segments of a row set, in order of slot; found from the step's host arrays."""
    triples = step.input.rows(row_set)
    if len(triples) == 0:
        return
    rows, _, weights = step.adapter_tensors(row_set)
    starts = triples.starts.tolist()
    for slot, start, end in zip(triples.segment_slots.tolist(), starts[:-1], starts[1:], strict=True):
        yield Segment(
            slot=slot,
            start=start,
            end=end,
            rows=rows[start:end],
            run=_run(triples, start, end),
            mix=None if bool(np.all(triples.weights[start:end] == 1.0)) else weights[start:end, None],
        )


def adapter_store(operator: str, step: Step) -> AdapterStore:
    """The step's store.

    Raises:
        OperatorError: the step names adapters but has no store.
    """
    store = step.state.adapters
    if store is None:
        raise OperatorError(operator, "the step names adapters but its state has no adapter store")
    return store


def sgmv(y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
    """Add every triple's delta to ``y: [rows, n]``, in place; ``x: [rows, k]``. Returns y.

    Raises:
        OperatorError: x or y is not of the weight's dtype and width, or they are on two devices.
    """
    _check_rows("sgmv", "y", y, weight.spec.n, weight, x=x)
    _check_rows("sgmv", "x", x, weight.spec.k, weight)
    if len(step.input.rows(row_set)) == 0:
        return y
    store, spec = adapter_store("sgmv", step), _plain_spec("sgmv", weight)
    starts = spec.starts
    total = y if y.dtype == torch.float32 else y.float()
    touched = False
    for segment in segments(step, row_set):
        rows: torch.Tensor | None = None
        for i in range(len(spec.slices)):
            matrices = store.read(spec.site, i, segment.slot)
            if matrices is None:
                continue
            if rows is None:
                rows = segment.take(x).float()
            h = segment.weigh(rows @ matrices.a.float().T)
            segment.add(total[:, starts[i] : starts[i + 1]], h @ matrices.b.float().T)
            touched = True
    if touched and total is not y:
        y.copy_(total)
    return y


def sgmv_shrink(x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
    """``h: [triples, slices, largest rank]`` float32; the largest rank is that of all filled slots at the site."""
    spec = _plain_spec("sgmv_shrink", weight)
    triples = len(step.input.rows(row_set))
    store = adapter_store("sgmv_shrink", step) if triples else None
    largest = _largest_rank(store, spec.site, len(spec.slices)) if store is not None else 0
    h = torch.zeros((triples, len(spec.slices), largest), dtype=torch.float32, device=x.device)
    if store is None:
        return h
    for segment in segments(step, row_set):
        rows = segment.take(x).float()
        for i in range(len(spec.slices)):
            matrices = store.read(spec.site, i, segment.slot)
            if matrices is not None:
                h[segment.start : segment.end, i, : matrices.a.shape[0]] = rows @ matrices.a.float().T
    return h


def sgmv_expand(
    y: torch.Tensor, h: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
) -> torch.Tensor:
    """Add ``mix * h @ B.T`` of every triple to ``y: [rows, n]``, in place; h as from :func:`sgmv_shrink`. Returns y.

    Raises:
        OperatorError: y is not of the weight's dtype and width, or not on h's device.
    """
    _check_rows("sgmv_expand", "y", y, weight.spec.n, weight, h=h)
    if len(step.input.rows(row_set)) == 0:
        return y
    store, spec = adapter_store("sgmv_expand", step), _plain_spec("sgmv_expand", weight)
    starts = spec.starts
    total = y if y.dtype == torch.float32 else y.float()
    for segment in segments(step, row_set):
        for i in range(len(spec.slices)):
            matrices = store.read(spec.site, i, segment.slot)
            if matrices is not None:
                own = h[segment.start : segment.end, i, : matrices.b.shape[1]].float()
                segment.add(total[:, starts[i] : starts[i + 1]], segment.weigh(own) @ matrices.b.float().T)
    if total is not y:
        y.copy_(total)
    return y


def _check_rows(
    operator: str, name: str, rows: torch.Tensor, width: int, weight: Weight, **beside: torch.Tensor
) -> None:
    """Refuse rows that are not of the weight's dtype, of ``width`` and on the device of the operand ``beside`` them,
    before anything is written."""
    if rows.dtype != weight.spec.dtype or rows.shape[-1] != width:
        raise OperatorError.describe(operator, f"{name} must be {weight.spec.dtype} rows of {width}", {name: rows})
    for other, operand in beside.items():
        if operand.device != rows.device:
            reason = f"{name} and {other} are on two devices"
            raise OperatorError.describe(operator, reason, {name: rows, other: operand})


def _plain_spec(operator: str, weight: Weight) -> WeightSpec:
    spec = weight.spec
    if spec.experts is not None:
        raise OperatorError(
            operator, f"weight {spec.site!r} has {spec.experts} experts; moe_experts applies their adapters"
        )
    return spec


def _largest_rank(store: AdapterStore, site: str, slices: int) -> int:
    filled = [slot for slot, where in enumerate(store.ranges()) if where is not None]
    return max((store.true_rank(site, i, slot) for slot in filled for i in range(slices)), default=0)


def _run(triples: AdapterRows, start: int, end: int) -> slice | None:
    rows = triples.rows[start:end]
    first = int(rows[0])
    if end - start == 1 or bool(np.all(rows[1:] - rows[:-1] == 1)):
        return slice(first, first + end - start)
    return None
