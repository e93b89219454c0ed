from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite import moe
from polyaccel.backend.composite.linear import dequantize
from polyaccel.backend.composite.step import TensorStep
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.weight import Quantisation, Weight
from tests.backend.composite.cases import (
    CPU,
    FLOAT_DTYPES,
    Adapters,
    Draw,
    Module,
    Triple,
    assert_within,
    f64,
    filled_store,
    filled_weight,
    spec_of,
    step_input,
    step_of,
    without_readback,
)

SEEDS = st.integers(0, 2**32 - 1)

# -- routing ---------------------------------------------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    mass = [math.exp(v - top) for v in values]
    return [m / sum(mass) for m in mass]


def largest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]


def routed(
    logits: list[float], top_k: int, scoring: str, bias: list[float] | None, groups: int, topk_groups: int
) -> tuple[list[float], list[int]]:
    if scoring == "softmax_topk":
        scores = softmax(logits)
        ids = largest(scores, top_k)
        return [scores[e] for e in ids], ids
    if scoring == "topk_softmax":
        ids = largest(logits, top_k)
        return softmax([logits[e] for e in ids]), ids
    scores = [1 / (1 + math.exp(-v)) for v in logits]
    choice = [s + (bias[e] if bias else 0.0) for e, s in enumerate(scores)]
    width = len(logits) // groups
    best = [sum(sorted(choice[g * width : (g + 1) * width])[-2:]) for g in range(groups)]
    kept = largest(best, topk_groups) if groups > 1 else range(groups)
    allowed = [c if e // width in kept else -math.inf for e, c in enumerate(choice)]
    ids = largest(allowed, top_k)
    return [scores[e] for e in ids], ids


@given(
    tokens=st.integers(0, 5),
    groups=st.sampled_from([1, 2, 3]),
    width=st.integers(1, 4),
    scoring=st.sampled_from(["softmax_topk", "topk_softmax", "sigmoid"]),
    renormalise=st.booleans(),
    with_bias=st.booleans(),
    dtype=st.sampled_from(FLOAT_DTYPES),
    data=st.data(),
    seed=SEEDS,
)
def test_routing_chooses_and_weighs_experts(
    tokens: int,
    groups: int,
    width: int,
    scoring: str,
    renormalise: bool,
    with_bias: bool,
    dtype: torch.dtype,
    data: st.DataObject,
    seed: int,
) -> None:
    experts, draw = groups * width, Draw(seed)
    topk_groups = data.draw(st.integers(1, groups))
    room = topk_groups * width if scoring == "sigmoid" else experts
    top_k = data.draw(st.integers(1, room))
    # Distinct scores with wide gaps, so that rounding cannot change the order.
    steps = np.stack([draw.generator.permutation(experts) for _ in range(tokens)]) if tokens else np.zeros((0, experts))
    logits = torch.from_numpy(steps.astype(np.float32) / 4 - 1).to(dtype)
    bias = torch.from_numpy(draw.generator.permutation(experts).astype(np.float32) * 8) if with_bias else None
    weights, ids = without_readback(moe.moe_route, logits, top_k, scoring, renormalise, bias, groups, topk_groups, 2.5)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (tokens, top_k)
    for t in range(tokens):
        own_bias = f64(bias).tolist() if bias is not None else None
        expected, chosen = routed(f64(logits)[t].tolist(), top_k, scoring, own_bias, groups, topk_groups)
        if renormalise:
            expected = [w / sum(expected) for w in expected]
        assert ids[t].tolist() == chosen
        assert_within(weights[t], 2.5 * np.array(expected), 2.5, depth=experts)


@pytest.mark.parametrize("scoring", ["softmax_topk", "topk_softmax", "sigmoid"])
def test_among_equal_scores_the_lowest_experts_win(scoring: str) -> None:
    logits = torch.zeros(3, 64)
    logits[1, 40] = 1.0
    weights, ids = moe.moe_route(logits, 4, scoring, True, None, 8, 4, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3], [40, 0, 1, 2], [0, 1, 2, 3]]
    assert weights[0].tolist() == [0.25] * 4


def test_scores_that_underflow_give_zero_weights_not_nan() -> None:
    weights, _ = moe.moe_route(torch.full((1, 4), -300.0), 2, "sigmoid", True)
    assert weights.tolist() == [[0.0, 0.0]]


def test_numbers_that_do_not_fit_the_experts_are_refused() -> None:
    logits = torch.zeros(1, 6)
    with pytest.raises(OperatorError, match="top_k 7 of 6"):
        moe.moe_route(logits, 7, "sigmoid", False)
    with pytest.raises(OperatorError, match="groups"):
        moe.moe_route(logits, 4, "sigmoid", False, None, 3, 1)
    with pytest.raises(OperatorError, match="scoring"):
        moe.moe_route(logits, 1, "random", False)
    with pytest.raises(OperatorError, match="logits must be floats"):
        moe.moe_route(logits.int(), 1, "sigmoid", False)


@pytest.mark.parametrize("scoring", ["softmax_topk", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [9, 17, 60])
def test_equal_logits_are_taken_lowest_id_first_whatever_their_value(scoring: str, experts: int) -> None:
    """torch.sigmoid differs in the last bit between a vector and the end of a row, for about one value in a hundred."""
    logits = (torch.arange(-2000, 2000) / 251.0).unsqueeze(1).expand(-1, experts)
    for row in logits.split(1):
        assert moe.moe_route(row.contiguous(), 2, scoring, False)[1].tolist() == [[0, 1]]


# -- experts ---------------------------------------------------------------------------------------------------------


def expert_output(
    x: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    deltas: list[tuple[Adapters, int, float]],
    expert: int,
    inner_dtype: torch.dtype,
) -> np.ndarray:
    """One token through one expert; the product of gate_up is rounded as the operator does."""
    n = len(gate_up) // 2
    h = f64(torch.from_numpy(gate_up @ x).to(inner_dtype))
    for adapters, slot, mix in deltas:
        for i in range(2):
            delta = adapters.delta("gate_up", i, slot, x, expert)
            if delta is not None:
                h[i * n : (i + 1) * n] += mix * delta
    inner = h[:n] / (1 + np.exp(-h[:n])) * h[n:]
    y = down @ inner
    for adapters, slot, mix in deltas:
        delta = adapters.delta("down", 0, slot, inner, expert)
        if delta is not None:
            y = y + mix * delta
    return y


def check_experts(
    got: torch.Tensor,
    x: torch.Tensor,
    weights: dict[str, TensorWeight],
    ids: torch.Tensor,
    routing: torch.Tensor,
    local: list[int],
    adapters: Adapters | None = None,
    triples: list[Triple] = [],  # noqa: B006
) -> None:
    gate_up, down = (f64(dequantize(weights[name])) for name in ("gate_up", "down"))
    expected = np.zeros((len(x), down.shape[1]))
    size = np.zeros_like(expected)
    for t in range(len(x)):
        deltas = [(adapters, slot, mix) for row, slot, mix in triples if row == t and adapters is not None]
        for j, expert in enumerate(ids[t].tolist()):
            if local[expert] >= 0:
                own = local[expert]
                y = expert_output(f64(x)[t], gate_up[own], down[own], deltas, own, x.dtype)
                expected[t] += float(routing[t, j]) * y
                # Any term may be as large as this; in 16 bits gate_up's rounding may go the other way at a tie.
                size[t] += abs(float(routing[t, j])) * np.abs(y).max()
    slack = 1.0 if x.dtype == torch.float32 else 2.0**6
    assert got.dtype == x.dtype
    assert_within(got, expected, 30 * slack * (size + 1), depth=64)


@st.composite
def routes(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    """Tokens, experts, top_k, and the local number of each global expert."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    held = draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    order, local = iter(range(experts)), []
    for own in held:
        local.append(next(order) if own else -1)
    return draw(st.integers(0, 9)), experts, top_k, local


@given(
    route=routes(),
    hidden=st.integers(1, 6),
    inner=st.integers(1, 5),
    dtype=st.sampled_from(FLOAT_DTYPES),
    with_adapters=st.booleans(),
    use_map=st.booleans(),
    seed=SEEDS,
)
def test_experts_give_this_ranks_weighted_sum(
    route: tuple[int, int, int, list[int]],
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    with_adapters: bool,
    use_map: bool,
    seed: int,
) -> None:
    tokens, experts, top_k, local = route
    local = local if use_map else list(range(experts))
    held, draw = sum(e >= 0 for e in local), Draw(seed)
    weights = {
        "gate_up": filled_weight(spec_of("gate_up", [inner, inner], hidden, dtype, experts=held, rank_rows=32), draw),
        "down": filled_weight(spec_of("down", [hidden], inner, dtype, experts=held, rank_rows=32), draw),
    }
    ids = (
        np.stack([draw.generator.permutation(experts)[:top_k] for _ in range(tokens)])
        if tokens
        else np.zeros((0, top_k))
    )
    expert_ids = torch.from_numpy(ids.astype(np.int32))
    routing = draw.tensor(tokens, top_k).abs()
    x = draw.tensor(tokens, hidden, dtype=dtype)
    triples: list[Triple] = []
    adapters = None
    if with_adapters and tokens:
        modules = {
            0: [Module("gate_up", i, 2, e) for i in range(2) for e in range(held)],
            3: [Module("down", 0, 3, e) for e in range(0, held, 2)] + [Module("gate_up", 1, 1, e) for e in range(held)],
        }
        adapters = filled_store(weights, modules, draw)
        triples = [(t, int(slot), 0.5 + t % 2 / 2) for t in range(tokens) for slot in (0, 3, 5) if (t + slot) % 3]
    step = step_of(
        step_input([(tokens, tokens)], adapters={"tokens": triples}), adapters=adapters.store if adapters else None
    )
    expert_map = torch.tensor(local, dtype=torch.int32) if use_map else None
    got = without_readback(
        moe.moe_experts,
        x,
        weights["gate_up"],
        weights["down"],
        expert_ids,
        routing,
        step,
        "silu",
        expert_map,
        dequantize=dequantize,
    )
    check_experts(got, x, weights, expert_ids, routing, local, adapters, triples)


def quantised(site: str, widths: list[int], k: int, experts: int, draw: Draw, bias: bool = False) -> TensorWeight:
    weight = TensorWeight(
        spec_of(site, widths, k, experts=experts, bias=bias, quantisation=Quantisation(group_size=4)), CPU
    )
    for expert in range(experts):
        for i, n in enumerate(widths):
            codes = torch.from_numpy(draw.generator.integers(0, 16, (n, k)).astype(np.uint8))
            zeros = torch.full((n, k // 4), 8, dtype=torch.uint8)
            weight.write_quantised(i, codes, zeros, draw.tensor(n, k // 4).half() / 8, expert=expert)
    return weight


def run(
    x: torch.Tensor, weights: dict[str, TensorWeight], ids: torch.Tensor, routing: torch.Tensor, step: TensorStep
) -> torch.Tensor:
    result = without_readback(
        moe.moe_experts, x, weights["gate_up"], weights["down"], ids, routing, step, dequantize=dequantize
    )
    assert isinstance(result, torch.Tensor)
    return result


def test_quantised_experts_compute_as_their_dequantised_form() -> None:
    draw = Draw(5)
    weights = {"gate_up": quantised("gate_up", [8, 8], 8, 3, draw), "down": quantised("down", [8], 8, 3, draw)}
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [1, 2]], dtype=torch.int32)
    x, routing = draw.tensor(4, 8), draw.tensor(4, 2).abs()
    step = step_of(step_input([(4, 4)]))
    check_experts(run(x, weights, ids, routing, step), x, weights, ids, routing, [0, 1, 2])


@pytest.mark.parametrize("bias", [False, True])
def test_experts_give_the_same_bits_whether_they_are_copied_at_once_or_one_by_one(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Draw(9)
    weights = {
        "gate_up": quantised("gate_up", [16, 16], 24, 4, draw, bias),
        "down": quantised("down", [24], 16, 4, draw, bias),
    }
    ids = torch.tensor([[i % 4, (i + 1) % 4] for i in range(9)], dtype=torch.int32)
    operands = (draw.tensor(9, 24), weights, ids, draw.tensor(9, 2).abs(), step_of(step_input([(9, 9)])))
    at_once = run(*operands)
    monkeypatch.setattr(moe, "SMALL", 0)
    assert torch.equal(run(*operands), at_once)


def test_many_tokens_on_one_expert_fill_several_blocks() -> None:
    draw = Draw(6)
    weights = {
        "gate_up": filled_weight(spec_of("gate_up", [3, 3], 4, experts=4), draw),
        "down": filled_weight(spec_of("down", [4], 3, experts=4), draw),
    }
    ids = torch.full((40, 1), 2, dtype=torch.int32)
    ids[17] = 0
    x, routing = draw.tensor(40, 4), torch.ones(40, 1)
    check_experts(
        run(x, weights, ids, routing, step_of(step_input([(40, 40)]))), x, weights, ids, routing, [0, 1, 2, 3]
    )


def test_a_bad_token_or_expert_spoils_only_what_is_routed_to_it() -> None:
    draw = Draw(7)
    weights = {
        "gate_up": filled_weight(spec_of("gate_up", [3, 3], 4, experts=3, rank_rows=8), draw),
        "down": filled_weight(spec_of("down", [4], 3, experts=3, rank_rows=8), draw),
    }
    adapters = filled_store(weights, {0: [Module("gate_up", 0, 2, e) for e in range(3)]}, draw)
    weights["down"].tensor[1] = torch.nan
    matrices = adapters.store.read("gate_up", 0, 0, 1)
    assert matrices is not None
    matrices.b.fill_(torch.inf)
    ids = torch.tensor([[0, 2], [1, 0], [2, 0], [0, 2]], dtype=torch.int32)
    x, routing = draw.tensor(4, 4), torch.ones(4, 2)
    x[0] = torch.inf
    triples: list[Triple] = [(t, 0, 1.0) for t in range(4)]
    step = step_of(step_input([(4, 4)], adapters={"tokens": triples}), adapters=adapters.store)
    out = run(x, weights, ids, routing, step)
    assert not out[0].isfinite().any()
    assert not out[1].isfinite().any()
    assert out[2:].isfinite().all()


def test_the_routing_weight_of_another_ranks_expert_is_not_used() -> None:
    draw = Draw(10)
    gate_up = filled_weight(spec_of("gate_up", [2, 2], 3, experts=1), draw)
    down = filled_weight(spec_of("down", [3], 2, experts=1), draw)
    ids, expert_map = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([0, -1], dtype=torch.int32)
    step, x = step_of(step_input([(1, 1)])), draw.tensor(1, 3)
    out = [
        moe.moe_experts(
            x, gate_up, down, ids, torch.tensor([[w, 1.0]]), step, "silu", expert_map, dequantize=dequantize
        )
        for w in (torch.nan, 0.0)
    ]
    assert out[0].isfinite().all()
    assert torch.equal(out[0], out[1])


def test_a_bias_is_added_in_each_expert() -> None:
    draw = Draw(8)
    weights = {
        "gate_up": filled_weight(spec_of("gate_up", [2, 2], 3, experts=2, bias=True), draw),
        "down": filled_weight(spec_of("down", [3], 2, experts=2, bias=True), draw),
    }
    for name in weights:
        weights[name].tensor.zero_()
    ids, x = torch.tensor([[1], [0]], dtype=torch.int32), draw.tensor(2, 3)
    out = run(x, weights, ids, torch.full((2, 1), 2.0), step_of(step_input([(2, 2)])))
    bias = weights["down"].bias
    assert bias is not None
    assert torch.equal(out, 2.0 * bias[[1, 0]])


class Opaque(Weight):
    """A weight of a backend's own class, known only through its dequantize."""

    def __init__(self, inner: TensorWeight) -> None:
        self.spec = inner.spec
        self.inner = inner

    def write(self, slice_index: int, source: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def write_bias(self, slice_index: int, source: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def write_quantised(self, slice_index: int, *parts: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def seal(self) -> None: ...

    def reopen(self) -> None: ...

    @property
    def nbytes(self) -> int:
        return 0


def test_other_weight_classes_are_read_through_their_dequantize() -> None:
    draw = Draw(9)
    weights = {
        "gate_up": filled_weight(spec_of("gate_up", [2, 2], 3, experts=2), draw),
        "down": filled_weight(spec_of("down", [3], 2, experts=2), draw),
    }
    ids, x = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32), draw.tensor(2, 3)
    routing, step = torch.ones(2, 2), step_of(step_input([(2, 2)]))
    gate_up, down = Opaque(weights["gate_up"]), Opaque(weights["down"])
    got = moe.moe_experts(x, gate_up, down, ids, routing, step, dequantize=lambda w: w.inner.tensor)  # type: ignore[attr-defined]
    assert torch.equal(got, run(x, weights, ids, routing, step))


def test_operands_that_do_not_fit_are_refused() -> None:
    draw = Draw(0)
    gate_up = filled_weight(spec_of("gate_up", [2, 2], 3, experts=2), draw)
    down = filled_weight(spec_of("down", [3], 2, experts=2), draw)
    ids, routing, step = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), step_of(step_input([(2, 2)]))

    def call(x: torch.Tensor, first: TensorWeight, second: TensorWeight, act: str = "silu") -> None:
        moe.moe_experts(x, first, second, ids, routing, step, act, dequantize=dequantize)

    with pytest.raises(OperatorError, match="activation"):
        call(torch.ones(2, 3), gate_up, down, "relu")
    with pytest.raises(OperatorError, match="rows of 3"):
        call(torch.ones(2, 4), gate_up, down)
    with pytest.raises(OperatorError, match="rows of 3"):
        call(torch.ones(2, 3).half(), gate_up, down)
    with pytest.raises(OperatorError, match="experts"):
        call(torch.ones(2, 3), gate_up, filled_weight(spec_of("down", [3], 2, experts=3), draw))
    with pytest.raises(OperatorError, match="do not fit"):
        call(torch.ones(2, 3), gate_up, filled_weight(spec_of("down", [3], 4, experts=2), draw))
    with pytest.raises(OperatorError, match="top_k"):
        call(torch.ones(3, 3), gate_up, down)
    routing = routing.int()
    with pytest.raises(OperatorError, match="weights must be floats"):
        call(torch.ones(2, 3), gate_up, down)


@pytest.mark.parametrize(
    ("pairs", "experts", "size", "count"),
    [(6, 8, 1, 6), (12, 4, 4, 6), (64, 2, 32, 3), (2000, 2, moe.LARGEST_BLOCK, 9)],
)
def test_blocks_waste_less_than_one_an_expert(pairs: int, experts: int, size: int, count: int) -> None:
    blocks = moe._blocks(torch.arange(pairs) % experts, experts)
    assert (blocks.size, blocks.count) == (size, count)
    assert blocks.count * blocks.size - pairs < blocks.size * experts
