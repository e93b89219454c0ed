"""Adapters on linear layers by batches of segments (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend.cpu.lora_plan import Batch, Expand


def add_adapters(y: torch.Tensor, x: torch.Tensor, batches: Sequence[Batch]) -> torch.Tensor:
    """Add every batch's delta to ``y: [T, n]`` (rows dense), in place; ``x: [T, k]`` contiguous. Returns y.

    Products accumulate in float32 and h is kept in x's dtype. y is rounded once a row, given that no row of a narrower
    y has several adapters or a mix weight (:attr:`AdapterPlan.single`).
    """
    for batch in batches:
        h = _shrink(x, batch)
        parts = (h,) if batch.slices == 1 else h.view(*h.shape[:2], batch.rank, batch.slices).movedim(3, 0).contiguous()
        for expand in batch.expands:
            _expand(y, parts[expand.slice], batch, expand)
    return y


def _shrink(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """``h: [segments, rows, rank * slices]``, rank rows outer, mix weights applied."""
    rows = x[batch.run] if batch.index is None else x.index_select(0, batch.index)
    rows = rows.view(batch.segments, batch.rows, x.shape[1])
    if batch.a is not None:
        h = torch.bmm(rows, batch.a)
    else:
        assert batch.gather is not None
        assert batch.a_rows is not None
        assert batch.keep is not None
        gathered = batch.a_rows.index_select(0, batch.gather)
        h = torch.bmm(rows, gathered.view(batch.segments, batch.rank * batch.slices, -1).transpose(1, 2))
        h.view(batch.segments, batch.rank, batch.slices).mul_(batch.keep.transpose(1, 2))
    return h if batch.mix is None else h.mul_(batch.mix)


def _expand(y: torch.Tensor, h: torch.Tensor, batch: Batch, expand: Expand) -> None:
    b = expand.b
    if batch.gather is not None:
        b = b.index_select(0, batch.gather).view(batch.segments, batch.rank, -1)
    exact = y.dtype == torch.float32
    if batch.index is not None:
        columns = y[:, expand.start : expand.end]
        if exact:
            # A row with several adapters appears several times.
            columns.index_add_(0, batch.index, torch.bmm(h, b).flatten(0, 1))
        else:
            old = columns.index_select(0, batch.index).view(batch.segments, batch.rows, -1)
            columns.index_copy_(0, batch.index, torch.baddbmm(old, h, b).flatten(0, 1))
        return
    target = y[batch.run, expand.start : expand.end]
    if batch.segments == 1:
        target.addmm_(h[0], b[0])
    elif exact:
        target.add_(torch.bmm(h, b).flatten(0, 1))
    else:
        # One rounding: the sum is formed before it leaves float32.
        grouped = target.view(batch.segments, batch.rows, -1)
        grouped.copy_(torch.baddbmm(grouped, h, b))
