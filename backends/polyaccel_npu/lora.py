"""Adapters by npu_grouped_matmul: exact segments, true ranks, every slice at once (Punica, arXiv 2310.18547).

A group is the rows of one segment with one slice's matrix, so nothing is padded to a common rank and slices may be
narrower than the rank. Shrink keeps h in x's dtype; expand multiplies in float32, and y is rounded once, after all of a
row's adapters were added.

One call takes 128 groups of a 16-bit dtype, whose matrices are all transposed or all dense (a matrix of one column
counts as dense). Of float32 it takes one (aclnnGroupedMatmulV5: FLOAT32 only where x, weight and y are single tensors),
so that the expand is a call a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polyaccel.backend import AdapterRows, RowSet, Step, Weight
from polyaccel_npu import check, runtime
from polyaccel_npu.adapter_store import NpuAdapterStore, own_store
from polyaccel_npu.issue import Issuer
from polyaccel_npu.lora_cover import covered
from polyaccel_npu.step import NpuStep

MOST_GROUPS = 128
"""Tensors in a list of aclnnGroupedMatmul."""
SEPARATE = 0
"""``split_item``: a result for each group."""


@dataclass(frozen=True, slots=True)
class Group:
    """Triples ``start:end``, all of one slot, with the matrices of one slice: ``a: [rank, k]``, ``b: [rank, n]``."""

    start: int
    end: int
    slice_index: int
    a: torch.Tensor
    b: torch.Tensor


def groups_of(store: NpuAdapterStore, site: str, slices: int, triples: AdapterRows) -> list[Group]:
    """By slice, then by segment; none where an adapter does not touch the slice."""
    starts, slots = triples.starts.tolist(), triples.segment_slots.tolist()
    found = []
    for index in range(slices):
        for slot, start, end in zip(slots, starts[:-1], starts[1:], strict=True):
            rows = store.rows(site, index, slot)
            if rows is not None:
                found.append(Group(start, end, index, rows[0], rows[1]))
    return found


class Lora:
    """Of one backend instance."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    def sgmv(
        self, y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        check.rows("sgmv", "x", x, weight, weight.spec.k)
        check.rows("sgmv", "y", y, weight, weight.spec.n)
        own = NpuStep.of("sgmv", step)
        self._issuer.launcher.common_device("npu.sgmv", {"y": y, "x": x})
        total = self.added(y, x, weight, own, row_set)
        return y if total is None else self._land(total, y)

    def partial(self, x: torch.Tensor, weight: Weight, step: NpuStep, row_set: RowSet) -> torch.Tensor | None:
        """What the adapters alone add to each row: ``[T, n]`` of x's dtype; None if nothing."""
        total = self.added(None, x, weight, step, row_set)
        return None if total is None else self._cast(total, x.dtype)

    def added(
        self, y: torch.Tensor | None, x: torch.Tensor, weight: Weight, step: NpuStep, row_set: RowSet
    ) -> torch.Tensor | None:
        """``y`` (zero without) plus every triple's delta, float32, ``[T, n]``: y itself where that is float32 already.
        None where no adapter touches the site."""
        if step.graph is not None:
            return covered(self._issuer, y, x, weight, step, step.graph.rank_rows, row_set)
        found = step.adapters(row_set)
        if found is None:
            return None
        triples, store = found[0], own_store("sgmv", found[1])
        if not store.covers(weight.spec.site):
            return None
        groups = groups_of(store, weight.spec.site, len(weight.spec.slices), triples)
        if not groups or not x.shape[0]:
            return None
        h = self._shrink(x, groups, triples, step, row_set)
        return self.expanded(y, x, h, groups, weight, step, row_set)

    def expanded(
        self,
        y: torch.Tensor | None,
        like: torch.Tensor,
        h: Sequence[torch.Tensor],
        groups: Sequence[Group],
        weight: Weight,
        step: NpuStep,
        row_set: RowSet,
    ) -> torch.Tensor:
        """``y`` plus ``mix * h @ b`` of every group, h float32."""
        spec, triples = weight.spec, step.input.rows(row_set)
        widths = (spec.k,) if spec.lookup else tuple(part.n for part in spec.slices)
        starts = (0, *np.cumsum(widths).tolist())
        if y is None:
            total = torch.zeros((like.shape[0], starts[-1]), dtype=torch.float32, device=like.device)
        else:
            total = self._cast(y, torch.float32)
        rows = step.adapter_tensors(row_set)[0]
        for index, width in enumerate(widths):
            own = [(group, part) for group, part in zip(groups, h, strict=True) if group.slice_index == index]
            columns = total[:, starts[index] : starts[index + 1]]
            for batch in batches(own, triples):
                self._expand(columns, batch, rows, triples, width)
        return total

    def sgmv_shrink(self, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
        check.rows("sgmv_shrink", "x", x, weight, weight.spec.k)
        own = NpuStep.of("sgmv_shrink", step)
        slices, found = len(weight.spec.slices), own.adapters(row_set)
        if found is None:
            return torch.zeros((0, slices, 0), dtype=torch.float32, device=x.device)
        triples, store = found[0], own_store("sgmv_shrink", found[1])
        site = weight.spec.site
        filled = [slot for slot, where in enumerate(store.ranges()) if where is not None]
        largest = max((store.true_rank(site, i, slot) for slot in filled for i in range(slices)), default=0)
        h = torch.zeros((len(triples), slices, largest), dtype=torch.float32, device=x.device)
        groups = groups_of(store, site, slices, triples) if store.covers(site) else []
        if groups:
            parts = self._shrink(x, groups, triples, own, row_set, weigh=False)
            for group, part in zip(groups, parts, strict=True):
                h[group.start : group.end, group.slice_index, : part.shape[1]].copy_(part)
        return h

    def sgmv_expand(
        self, y: torch.Tensor, h: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        check.rows("sgmv_expand", "y", y, weight, weight.spec.n)
        check.floats("sgmv_expand", h=h)
        self._issuer.launcher.common_device("npu.sgmv_expand", {"y": y, "h": h})
        own = NpuStep.of("sgmv_expand", step)
        found = own.adapters(row_set)
        if found is None:
            return y
        triples, store = found[0], own_store("sgmv_expand", found[1])
        if not store.covers(weight.spec.site):
            return y
        groups = groups_of(store, weight.spec.site, len(weight.spec.slices), triples)
        if not groups:
            return y
        wide, mixes = self._cast(h, torch.float32), own.adapter_tensors(row_set)[2]
        if not bool(np.all(triples.weights == 1.0)):
            operands = {"h": wide, "mix": mixes}
            wide = self._issuer.issue("sgmv_mix", operands, torch.ops.aten.mul, wide, mixes.view(-1, 1, 1))
        parts = [wide[g.start : g.end, g.slice_index, : g.b.shape[0]].contiguous() for g in groups]
        return self._land(self.expanded(y, y, parts, groups, weight, own, row_set), y)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _shrink(
        self,
        x: torch.Tensor,
        groups: Sequence[Group],
        triples: AdapterRows,
        step: NpuStep,
        row_set: RowSet,
        weigh: bool = True,
    ) -> list[torch.Tensor]:
        """h of every group, ``[rows, rank]`` float32, times the mixes."""
        issuer = self._issuer
        rows, _, mixes = step.adapter_tensors(row_set)
        x = issuer.operands.dense("sgmv", "x", x)
        if not consecutive(triples.rows, x.shape[0]):
            x = issuer.issue("sgmv_gather", {"x": x, "rows": rows}, torch.ops.aten.index_select, x, 0, rows)
        if not x.shape[1]:
            return [torch.zeros((g.end - g.start, g.a.shape[0]), dtype=torch.float32, device=x.device) for g in groups]
        parts = self._grouped([x[g.start : g.end] for g in groups], [g.a.t() for g in groups])
        plain = not weigh or bool(np.all(triples.weights == 1.0))
        if x.dtype == torch.float32 and plain:
            return parts
        flat = [part.view(-1) for part in parts]
        joined = flat[0] if len(flat) == 1 else issuer.issue("sgmv_join", {"h": flat[0]}, torch.ops.aten.cat, flat, 0)
        joined = self._cast(joined, torch.float32)
        if not plain:
            mixed = [mixes[g.start : g.end, None].expand(-1, g.a.shape[0]).reshape(-1) for g in groups]
            factors = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
            joined = issuer.issue("sgmv_mix", {"h": joined, "mix": factors}, torch.ops.aten.mul, joined, factors)
        sizes = [part.numel() for part in parts]
        return [own.view(part.shape) for own, part in zip(joined.split(sizes), parts, strict=True)]

    def _expand(
        self,
        columns: torch.Tensor,
        batch: Sequence[tuple[Group, torch.Tensor]],
        rows: torch.Tensor,
        triples: AdapterRows,
        width: int,
    ) -> None:
        """Add the groups of one slice, whose rows are all different, to its columns of the float32 sum."""
        issuer = self._issuer
        inputs, matrices = [h for _, h in batch], [group.b for group, _ in batch]
        operands = {"h": inputs[0], "b": matrices[0]}
        result = self._grouped(inputs, matrices)
        delta = result[0] if len(result) == 1 else issuer.issue("sgmv_join", operands, torch.ops.aten.cat, result, 0)
        taken = np.concatenate([triples.rows[group.start : group.end] for group, _ in batch])
        first = int(taken[0])
        if run(taken):
            place = columns[first : first + len(taken)]
            issuer.issue("sgmv_add", {"y": place, "delta": delta}, torch.ops.aten.add_, place, delta)
            return
        picked = [rows[group.start : group.end] for group, _ in batch]
        index = picked[0] if len(picked) == 1 else torch.cat(picked)
        issuer.issue("sgmv_add", {"y": columns, "delta": delta}, torch.ops.aten.index_add_, columns, 0, index, delta)

    def _grouped(self, inputs: Sequence[torch.Tensor], matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each of the ``inputs: [m, k]`` times its matrix ``[k, n]``, in as few calls as are legal."""
        results: list[torch.Tensor | None] = [None] * len(inputs)
        for numbers in legal_calls(matrices):
            taken = [inputs[i] for i in numbers], [matrices[i] for i in numbers]
            operands = {"x": taken[0][0], "weight": taken[1][0]}
            found = self._issuer.issue(
                "grouped_matmul",
                operands,
                runtime.ops().npu_grouped_matmul,
                *taken,
                split_item=SEPARATE,
                group_type=-1,
            )
            for i, result in zip(numbers, found, strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    def _cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x if x.dtype == dtype else self._issuer.issue("cast", {"x": x}, torch.ops.aten._to_copy, x, dtype=dtype)

    def _land(self, total: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if total is not y:
            self._issuer.issue("sgmv_land", {"y": y, "total": total}, torch.ops.aten.copy_, y, total)
        return y


def legal_calls(matrices: Sequence[torch.Tensor]) -> list[list[int]]:
    """Which of the matrices one call of aclnnGroupedMatmul takes together, by their numbers."""
    most = 1 if matrices and matrices[0].dtype == torch.float32 else MOST_GROUPS
    kinds = ([i for i, m in enumerate(matrices) if m.is_contiguous() == dense] for dense in (True, False))
    return [numbers[at : at + most] for numbers in kinds for at in range(0, len(numbers), most)]


def batches(
    groups: Sequence[tuple[Group, torch.Tensor]], triples: AdapterRows
) -> list[list[tuple[Group, torch.Tensor]]]:
    """Groups that may be added at once: at most 128, and no row in two of them, whose sums would race."""
    found: list[list[tuple[Group, torch.Tensor]]] = []
    seen: set[int] = set()
    for group, h in groups:
        own = triples.rows[group.start : group.end].tolist()
        if not found or len(found[-1]) == MOST_GROUPS or not seen.isdisjoint(own):
            found.append([])
            seen = set()
        found[-1].append((group, h))
        seen.update(own)
    return found


def consecutive(rows: np.ndarray, count: int) -> bool:
    """Whether the rows are ``0, 1, ... count - 1``, so that x is in the order of triples already."""
    return len(rows) <= count and int(rows[0]) == 0 and run(rows)


def run(rows: np.ndarray) -> bool:
    """Whether each row is one more than the one before."""
    return len(rows) < 2 or bool(np.all(rows[1:] - rows[:-1] == 1))
