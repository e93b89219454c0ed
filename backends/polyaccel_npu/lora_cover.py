"""Adapters in a captured step: products over all rank rows that the graph covers, with each row's own picked by data.

Segments differ from step to step and a graph's calls do not. So h is made for every rank row, what is not the row's
own becomes zero, whatever it was, and one product with B sums a row's adapters in float32. Decode has few rows: its
products read A and B once, as segments of all adapters would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend import RowSet, Weight
from polyaccel_npu.adapter_store import NpuAdapterStore
from polyaccel_npu.issue import Issuer
from polyaccel_npu.step import NpuStep

aten = torch.ops.aten


def covered(
    issuer: Issuer,
    y: torch.Tensor | None,
    x: torch.Tensor,
    weight: Weight,
    step: NpuStep,
    rank_rows: int,
    row_set: RowSet,
) -> torch.Tensor | None:
    """``y`` (zero without) plus the adapters' deltas for ``x: [T, k]``: a new float32 ``[T, n]``; None where the site
    has none."""
    store, spec = step.state.adapters, weight.spec
    if not rank_rows or not isinstance(store, NpuAdapterStore) or not store.covers(spec.site) or not x.shape[0]:
        return None
    buffers, rows = store.sites[spec.site], min(rank_rows, store.rank_rows)
    x = issuer.operands.dense("sgmv", "x", x)
    if not x.shape[1]:
        h = torch.zeros((len(buffers.b), x.shape[0], rows), dtype=torch.float32, device=x.device)
    else:
        operands = {"x": x, "a": buffers.a}
        made = [issuer.tensor("sgmv_shrink", operands, aten.mm, x, a[:rows].t()) for a in buffers.a.unbind(0)]
        h = made[0].unsqueeze(0) if len(made) == 1 else issuer.tensor("sgmv_stack", {"h": made[0]}, aten.stack, made)
    return _added(issuer, y, _expanded(issuer, h, [b[:rows] for b in buffers.b], step, row_set))


def covered_lookup(
    issuer: Issuer, x: torch.Tensor, ids: torch.Tensor, weight: Weight, step: NpuStep, rank_rows: int
) -> torch.Tensor:
    """``x: [T, hidden]``, looked up at ``ids: [T]`` (counted from this rank's first), plus the adapters' deltas."""
    store, spec = step.state.adapters, weight.spec
    if not rank_rows or not isinstance(store, NpuAdapterStore) or not store.covers(spec.site) or not spec.n:
        return x
    buffers, rows = store.sites[spec.site], min(rank_rows, store.rank_rows)
    a, nearest = buffers.a[0, :rows], ids.clamp(0, spec.n - 1)
    columns = issuer.tensor("embedding.lookup", {"a": a, "ids": nearest}, aten.index_select, a, 1, nearest)
    inside = ((ids >= 0) & (ids < spec.n)).unsqueeze(1)
    h = torch.where(inside, columns.t().float(), 0.0)
    parts = _expanded(issuer, h.unsqueeze(0), [buffers.b[0][:rows]], step, "tokens")
    total = _added(issuer, x, parts)
    return total if total.dtype == x.dtype else total.to(x.dtype)


def _expanded(
    issuer: Issuer, h: torch.Tensor, matrices: Sequence[torch.Tensor], step: NpuStep, row_set: RowSet
) -> list[torch.Tensor]:
    """``h: [slices, T, rank_rows]``, each row's own times its mixes, by each slice's ``b: [rank_rows, n]``, float32."""
    own, mix = step.cover(row_set, h.shape[2])
    operands = {"h": h, "mix": mix}
    mixed = issuer.tensor("sgmv_mix", operands, aten.mul, h, mix)
    # What is not the row's own may be anything, and anything times zero may be NaN.
    mixed = issuer.tensor("sgmv_pick", operands, aten.where, own, mixed, 0.0)
    pairs = zip(mixed.unbind(0), matrices, strict=True)
    return [issuer.tensor("sgmv_expand", {"h": part, "b": b}, aten.mm, part, b) for part, b in pairs]


def _added(issuer: Issuer, y: torch.Tensor | None, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    first = {"delta": parts[0]}
    delta = parts[0] if len(parts) == 1 else issuer.tensor("sgmv_join", first, aten.cat, parts, 1)
    return delta if y is None else issuer.tensor("sgmv_add", {"y": y, "delta": delta}, aten.add, delta, y)
