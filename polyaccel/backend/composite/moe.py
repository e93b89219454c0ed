"""Routing and experts.

How many tokens an expert gets is known only to the device, which is not asked. So each expert's rows are padded to
blocks of a fixed size whose number has an upper bound known to the host; every block then is one product with the
weights of one expert, looked up on the device. That costs one copy of an expert per block, of which there are at most
as many as routed rows, and about 1.5 to 2 for each expert when tokens are many; and about three times the routed rows.
A result that is used comes from a row and an expert that it was routed to, so a NaN stays with its token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyaccel.backend.composite.linear import dequantize_experts
from polyaccel.backend.composite.lora import adapter_store, segments
from polyaccel.backend.composite.tiles import whole_tiles
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.step import Step
from polyaccel.backend.weight import Weight

LARGEST_BLOCK = 256
SMALL = 1 << 16
"""Elements of all blocks' experts that are copied at once; larger ones are copied one after the other."""

Dequantize = Callable[[Weight], torch.Tensor]


def moe_route(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalise: bool,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[tokens, top_k]`` float32 and ids ``[tokens, top_k]`` int32 from ``logits: [tokens, experts]``.

    Raises:
        OperatorError: logits that are no floats, an unknown scoring, or numbers that do not fit the experts.
    """
    experts = logits.shape[-1]
    if not logits.is_floating_point():
        raise OperatorError.describe("moe_route", "logits must be floats", {"logits": logits})
    if not 1 <= top_k <= experts:
        raise OperatorError.describe("moe_route", f"top_k {top_k} of {experts} experts", {"logits": logits})
    wide = logits.float()
    if scoring == "softmax_topk":
        scores, ids = _largest(torch.softmax(wide, dim=-1), top_k)
    elif scoring == "topk_softmax":
        scores, ids = _largest(wide, top_k)
        scores = torch.softmax(scores, dim=-1)
    elif scoring == "sigmoid":
        # torch's own sigmoid gives some equal logits different values on the CPU, where a row ends within a vector.
        plain = 1 / (1 + torch.exp(-wide))
        choice = plain if bias is None else plain + bias.float()
        if groups > 1:
            choice = _restrict(choice, groups, topk_groups, top_k)
        ids = _largest(choice, top_k)[1]
        scores = plain.gather(-1, ids)
    else:
        raise OperatorError("moe_route", f"scoring {scoring!r}, expected softmax_topk, topk_softmax or sigmoid")
    if renormalise:
        # The bound is below every normal sum; it only keeps 0 / 0 from making a NaN.
        scores = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return scores * scale, ids.to(torch.int32)


def _largest(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of the last dimension in falling order; topk does not promise the lowest id among equals."""
    values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :top_k], ids[..., :top_k]


def _restrict(choice: torch.Tensor, groups: int, topk_groups: int, top_k: int) -> torch.Tensor:
    experts = choice.shape[-1]
    if experts % groups or not 1 <= topk_groups <= groups or top_k > topk_groups * (experts // groups):
        raise OperatorError(
            "moe_route", f"top_k {top_k} of {topk_groups} out of {groups} groups does not fit {experts} experts"
        )
    grouped = choice.view(*choice.shape[:-1], groups, experts // groups)
    best = _largest(grouped, min(2, experts // groups))[0].sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, _largest(best, topk_groups)[1], True)
    return torch.where(kept.unsqueeze(-1), grouped, -torch.inf).flatten(-2)


def moe_experts(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    ids: torch.Tensor,
    weights: torch.Tensor,
    step: Step,
    act: str = "silu",
    expert_map: torch.Tensor | None = None,
    *,
    dequantize: Dequantize,
) -> torch.Tensor:
    """This rank's part of the experts' weighted sum, ``[tokens, hidden]`` of x's dtype.

    gate_up's product is rounded to x's dtype; its adapters and everything after it are float32.

    Raises:
        OperatorError: operands that do not fit each other.
    """
    experts = _check(x, gate_up, down, ids, weights, act)
    tokens, top_k = ids.shape
    out = torch.zeros((tokens, down.spec.n), dtype=torch.float32, device=x.device)
    if tokens and experts:
        local = ids.to(torch.int64)
        if expert_map is not None:
            local = expert_map.index_select(0, local.flatten()).to(torch.int64).view(tokens, top_k)
        blocks = _blocks(local.flatten(), experts)
        pairs = torch.arange(tokens * top_k, dtype=torch.int64, device=x.device)
        h = _product(x, torch.div(pairs, top_k, rounding_mode="floor"), gate_up, blocks, x.dtype, dequantize)
        h = _adapt(h.view(tokens, top_k, gate_up.spec.n), x.unsqueeze(1), gate_up, local, step)
        gate, up = h.float().chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        y = _product(inner.flatten(0, 1), pairs, down, blocks, torch.float32, dequantize)
        y = _adapt(y.view(tokens, top_k, down.spec.n), inner, down, local, step)
        held = (local >= 0).unsqueeze(-1)
        out = torch.where(held, y * weights.float().unsqueeze(-1), 0.0).sum(1)
    return out.to(x.dtype)


def _check(x: torch.Tensor, gate_up: Weight, down: Weight, ids: torch.Tensor, weights: torch.Tensor, act: str) -> int:
    first, second = gate_up.spec, down.spec
    operands = {"x": x, "ids": ids, "weights": weights}
    if act != "silu":
        raise OperatorError("moe_experts", f"activation {act!r}, expected 'silu'")
    if first.experts is None or first.experts != second.experts:
        raise OperatorError(
            "moe_experts", f"{first.site!r} has {first.experts} experts, {second.site!r} {second.experts}"
        )
    if len(first.slices) != 2 or first.slices[0].n != first.slices[1].n or second.k != first.slices[0].n:
        raise OperatorError(
            "moe_experts", f"slices {first.slices} of {first.site!r} do not fit k {second.k} of {second.site!r}"
        )
    if x.shape[-1] != first.k or x.dtype != first.dtype:
        raise OperatorError.describe("moe_experts", f"{first.site!r} takes {first.dtype} rows of {first.k}", operands)
    if not weights.is_floating_point():
        raise OperatorError.describe("moe_experts", "weights must be floats", operands)
    if ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise OperatorError.describe("moe_experts", "ids and weights are not [tokens, top_k]", operands)
    return first.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """Pairs (token, choice) sorted by local expert into ``count`` blocks of ``size`` rows.

    ``source``: ``[count * size]`` pair that fills each row; unused rows repeat pair 0 and are never looked at.
    ``place``: ``[pairs]`` row of each pair; ``count * size`` for pairs of other ranks. ``expert``: ``[count]``.
    """

    size: int
    count: int
    source: torch.Tensor
    place: torch.Tensor
    expert: torch.Tensor


def _blocks(local: torch.Tensor, experts: int) -> _Blocks:
    pairs, device = local.shape[0], local.device
    size = 1
    while size < min(LARGEST_BLOCK, pairs // experts):
        size *= 2
    # Every expert that gets rows wastes at most size - 1 of them.
    count = (pairs + (size - 1) * min(experts, pairs)) // size
    every = torch.arange(experts, dtype=torch.int64, device=device)
    key, order = torch.sort(torch.where(local < 0, experts, local), stable=True)
    rows = (local.unsqueeze(1) == every).sum(0)
    first_row = torch.cumsum(rows, 0) - rows
    used = torch.div(rows + size - 1, size, rounding_mode="floor")
    last_block = torch.cumsum(used, 0)
    # One entry more for the pairs of other ranks, whose place is overwritten below.
    shift = torch.nn.functional.pad((last_block - used) * size - first_row, (0, 1))
    ranked = torch.arange(pairs, dtype=torch.int64, device=device) + shift.index_select(0, key)
    ranked = torch.where(key == experts, count * size, ranked)
    source = torch.zeros(count * size + 1, dtype=torch.int64, device=device).index_copy_(0, ranked, order)[:-1]
    place = torch.empty_like(ranked).index_copy_(0, order, ranked)
    index = torch.arange(count, dtype=torch.int64, device=device)
    expert = (last_block <= index.unsqueeze(1)).sum(1).clamp(max=experts - 1)
    return _Blocks(size=size, count=count, source=source, place=place, expert=expert)


def _product(
    x: torch.Tensor, rows: torch.Tensor, weight: Weight, blocks: _Blocks, dtype: torch.dtype, dequantize: Dequantize
) -> torch.Tensor:
    """``[pairs, n]``: row ``rows[pair]`` of x times the matrix of the pair's expert; zero for pairs of other ranks."""
    spec = weight.spec
    take, bias = _experts_of(weight, dequantize)
    packed = x.index_select(0, rows.index_select(0, blocks.source)).to(dtype).view(blocks.count, blocks.size, spec.k)
    # One row more, for the pairs of other ranks.
    out = torch.zeros((blocks.count * blocks.size + 1, spec.n), dtype=dtype, device=x.device)
    biases = None if bias is None else bias.index_select(0, blocks.expert).to(dtype)
    matrices = take(blocks.expert).to(dtype) if blocks.count * spec.n * spec.k <= SMALL else None
    for i in range(blocks.count):
        matrix = take(blocks.expert[i : i + 1])[0].to(dtype) if matrices is None else matrices[i]
        own, matrix = whole_tiles(packed[i], matrix, axis=-1)
        own_bias = None if biases is None else biases[i]
        out[i * blocks.size : (i + 1) * blocks.size] = torch.nn.functional.linear(own, matrix, own_bias)
    return out.index_select(0, blocks.place)


def _experts_of(
    weight: Weight, dequantize: Dequantize
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
    """How to get copies ``[m, n, k]`` of experts, and the bias; one expert at a time where the storage is known."""
    if isinstance(weight, TensorWeight):
        return lambda experts: dequantize_experts(weight, experts), weight.bias
    if weight.spec.bias:
        raise OperatorError(
            "moe_experts",
            f"the plain-torch form cannot read the bias of a {type(weight).__name__} ({weight.spec.site!r})",
        )
    plain = dequantize(weight)
    return lambda experts: plain.index_select(0, experts), None


def _adapt(h: torch.Tensor, x: torch.Tensor, weight: Weight, local: torch.Tensor, step: Step) -> torch.Tensor:
    """``h: [tokens, top_k, n]`` plus the adapters of each pair's expert on ``x: [tokens, top_k or 1, k]``.

    Float32 where an adapter applies. Ranks are small, so each expert's adapter runs on all of its segment's pairs.
    """
    if len(step.input.rows("tokens")) == 0:
        return h
    store, spec = adapter_store("moe_experts", step), weight.spec
    starts, total, touched = spec.starts, h.float(), False
    nothing = total.new_zeros(())
    every = torch.arange(spec.experts or 0, dtype=local.dtype, device=local.device)
    for segment in segments(step, "tokens"):
        rows: torch.Tensor | None = None
        for i in range(len(spec.slices)):
            for expert in range(spec.experts or 0):
                matrices = store.read(spec.site, i, segment.slot, expert)
                if matrices is None:
                    continue
                if rows is None:
                    taken, chosen = segment.take(x), segment.take(local).unsqueeze(-1) == every
                    rows = taken.float().flatten(0, 1)
                    mix = None if segment.mix is None else segment.mix.unsqueeze(-1)
                delta = (rows @ matrices.a.float().T @ matrices.b.float().T).view(*taken.shape[:2], -1)
                if mix is not None:
                    delta = delta * mix
                segment.add(
                    total[..., starts[i] : starts[i + 1]], torch.where(chosen[..., expert : expert + 1], delta, nothing)
                )
                touched = True
    return total if touched else h
