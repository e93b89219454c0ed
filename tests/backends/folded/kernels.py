"""The arithmetic, on tensors that are ready. Products and sums are float32; callers round once."""

from __future__ import annotations

import torch

from polyaccel.backend import OperatorError

from .adapter_store import FoldedAdapterStore
from .kv_cache import FoldedKVCache
from .weight import FoldedWeight


def product(
    x: torch.Tensor, weight: FoldedWeight, rank_rows: int = 0, expert: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One product with W's columns and the first ``rank_rows`` rank rows of every slice.

    ``x: [rows, k]``. Returns ``y: [rows, n]`` with the bias, and ``h: [rows, rank_rows, slices]`` of all slots,
    with whatever the slots hold that a row does not name, NaN included.
    """
    spec, slices = weight.spec, len(weight.spec.slices)
    buffer = weight.buffer if expert is None else weight.buffer[expert]
    columns = weight.n_padded + rank_rows * slices if rank_rows else spec.n
    wide = torch.nn.functional.pad(x.float(), (0, weight.k_padded - spec.k))
    out = wide @ buffer[: weight.k_padded, :columns].float()
    y, h = out[:, : spec.n], out[:, weight.n_padded :]
    if weight.bias is not None:
        y = y + (weight.bias if expert is None else weight.bias[expert]).float()
    return y, h.reshape(x.shape[0], rank_rows, slices)


def lookup(ids: torch.Tensor, weight: FoldedWeight, rank_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of an embedding's buffer: ``x: [tokens, k]`` and ``h: [tokens, rank_rows, 1]``; zeros for ids outside."""
    inside = ((ids >= 0) & (ids < weight.spec.n)).unsqueeze(1)
    if not weight.spec.n:
        return torch.zeros(len(ids), weight.spec.k), torch.zeros(len(ids), rank_rows, 1)
    column = weight.buffer[: weight.k_padded + rank_rows, ids.clamp(0, weight.spec.n - 1)].T.float()
    column = torch.where(inside, column, 0.0)
    return column[:, : weight.spec.k], column[:, weight.k_padded :].unsqueeze(2)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    mix: torch.Tensor,
    store: FoldedAdapterStore,
    weight: FoldedWeight,
    expert: int | None = None,
) -> torch.Tensor:
    """``y: [rows, n]`` plus what each row's adapters make of its ``h: [rank_rows, slices]``; ``mix: [rows, slots]``."""
    spec = weight.spec
    starts = (0, spec.k) if spec.lookup else spec.starts
    y = y.clone()
    for slot, (first, count) in enumerate(store.spans.tolist()):
        uses = mix[:, slot : slot + 1]
        touched = uses != 0
        if count == 0 or not touched.any():
            continue
        if first + count > h.shape[1]:
            raise OperatorError("expand", f"slot {slot} has rank rows {first}:{first + count}, h covers {h.shape[1]}")
        for index, part in enumerate(store.b[spec.site]):
            b = (part if expert is None else part[expert])[first : first + count]
            delta = (h[:, first : first + count, index] * uses) @ b.float()
            columns = y[:, starts[index] : starts[index + 1]]
            columns.copy_(torch.where(touched, columns + delta, columns))
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once to x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def attention(
    q: torch.Tensor,
    kv: FoldedKVCache,
    layer: int,
    starts: list[int],
    contexts: list[int],
    tables: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of ``q: [T, heads, head_dim]``, sequence by sequence; tokens of no context give zeros."""
    out = torch.zeros(q.shape, dtype=torch.float32)
    for sequence, context in enumerate(contexts):
        begin, end = starts[sequence], starts[sequence + 1]
        if context == 0 or begin == end:
            continue
        # Earlier keys are outside of every query's window and may hold anything.
        first = 0 if window is None else max(0, context - (end - begin) - window + 1)
        positions = torch.arange(first, context)
        blocks = tables[sequence].long()[positions // kv.spec.block_size]
        k, v = kv.at(layer, blocks * kv.spec.block_size + positions % kv.spec.block_size)
        queries = torch.arange(context - (end - begin), context).unsqueeze(1)
        seen = positions <= queries
        if window is not None:
            seen &= positions > queries - window
        grouped = q[begin:end].float().view(end - begin, k.shape[0], -1, q.shape[2]).permute(1, 2, 0, 3)
        scores = (grouped @ k.float().unsqueeze(1) * scale).masked_fill(~seen, -torch.inf)
        part = torch.softmax(scores, -1) @ v.float().mT.unsqueeze(1)
        out[begin:end] = part.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def experts(
    x: torch.Tensor,
    gate_up: FoldedWeight,
    down: FoldedWeight,
    ids: torch.Tensor,
    weights: torch.Tensor,
    mix: torch.Tensor,
    rank_rows: int,
    store: FoldedAdapterStore | None,
) -> torch.Tensor:
    """This rank's part of ``sum_j weights[t, j] * expert(x[t])``; ``ids: [T, top_k]`` local, -1 where not held."""

    def apply(rows: torch.Tensor, weight: FoldedWeight, expert: int, where: torch.Tensor) -> torch.Tensor:
        covered = rank_rows if store is not None and store.covers(weight.spec.site) else 0
        y, h = product(rows, weight, covered, expert)
        return y if store is None or not covered else expand(y, h, mix[where], store, weight, expert)

    out = torch.zeros(x.shape[0], down.spec.n)
    for expert in range(gate_up.spec.experts or 0):
        tokens, choices = torch.nonzero(ids == expert, as_tuple=True)
        if len(tokens) == 0:
            continue
        gate, up = apply(x[tokens].float(), gate_up, expert, tokens).chunk(2, dim=-1)
        y = apply(torch.nn.functional.silu(gate) * up, down, expert, tokens)
        out.index_add_(0, tokens, y * weights[tokens, choices].unsqueeze(1))
    return out
