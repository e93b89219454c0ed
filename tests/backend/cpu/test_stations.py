"""Every station against the contract's own body over composites on a plain-torch backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import stations
from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.communicator import SingleRank
from polyaccel.backend.cpu import dense
from polyaccel.backend.kv_cache import KVSpec
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import DeviceState
from polyaccel.backend.table import TableBackend
from tests.backend.composite.cases import CPU, Draw, Module, Triple, f64, spec_of, step_input
from tests.backend.cpu.machine import Machine, columns_first

RANK = 3


class Pair:
    """The same weight, adapters and steps on the CPU backend and on one of composites only."""

    def __init__(self, widths: list[int], k: int, dtype: torch.dtype, draw: Draw, *, bias: bool = False) -> None:
        self.machine, self.plain = Machine(), TableBackend("cpu", {})
        spec = spec_of("w", widths, k, dtype, bias=bias, rank_rows=99)
        self.weight, values = self.machine.weight(spec, draw)
        self.plain_weight = self.plain.allocate_weight(spec, CPU)
        start = 0
        for i, n in enumerate(widths):
            rows = torch.from_numpy(values[start : start + n])
            self.plain_weight.write(i, rows[:, :k])
            if bias:
                self.plain_weight.write_bias(i, rows[:, k])
            start += n
        modules = {slot: [Module("w", i, RANK) for i in range(len(widths))] for slot in range(3)}
        self.store, packed = self.machine.store({"w": self.weight}, modules, draw)
        self.plain_store = self.plain.allocate_adapters({"w": self.plain_weight}, rank_rows=99, slots=6, device=CPU)
        for slot, content in packed.items():
            where = SlotRange(slot=slot, first_rank_row=9 * slot, rank_rows=RANK)
            self.plain_store.write(where, content)

    def body(self, station: str) -> Callable[..., Any]:
        """The station of composites."""
        operators = {**self.plain.composites(), "linear": self.plain.table()["linear"][0].fn}
        operators["row_parallel_linear"] = stations.build("row_parallel_linear", operators)
        return stations.build(station, operators)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """The product alone, without adapters."""
        product: torch.Tensor = self.plain.table()["linear"][0].fn(x, self.plain_weight)
        return product

    def steps(self, inputs: Any, caches: tuple[Any, Any] = (None, None)) -> tuple[Any, Any]:
        own = self.machine.begin(inputs, adapters=self.store, kv=caches[0])
        state = DeviceState(adapters=self.plain_store, kv=caches[1])
        return own, self.plain.begin_step(inputs, state, CPU)


def assert_alike(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """Within a few roundings of the largest value; both sides were computed in ``dtype`` in other orders.

    ``size``: of what was rounded on the way, which may be larger than anything that comes out.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == dtype
    if expected.numel():
        largest = max(1.0, size, float(expected.float().abs().max()))
        worst = float((got.float() - expected.float()).abs().max())
        assert worst <= (64 if dtype == torch.float32 else 6) * torch.finfo(dtype).eps * largest


def adapter_triples(draw: st.DrawFn, rows: int) -> list[Triple]:
    kind = draw(st.sampled_from(["none", "one each", "segment", "mixed"]))
    if kind == "none" or not rows:
        return []
    if kind == "segment":
        return [(row, 1, 1.0) for row in range(rows)]
    if kind == "one each":
        return [(row, row % 4, 1.0) for row in range(rows) if row % 4 < 3]
    return [(row, slot, 0.5 - slot) for row in range(0, rows, 2) for slot in range(2)]


@st.composite
def station_case(draw: st.DrawFn) -> tuple[int, list[Triple], int]:
    rows = draw(st.integers(0, 6))
    return rows, adapter_triples(draw, rows), draw(st.integers(0, 2**32 - 1))


DTYPE = st.sampled_from([torch.float32, torch.bfloat16])


def largest_of(*tensors: torch.Tensor) -> float:
    return max((float(t.float().abs().max()) for t in tensors if t.numel()), default=0.0)


@given(case=station_case(), k=st.integers(1, 20), n=st.integers(1, 9), dtype=DTYPE, bias=st.booleans())
def test_gate_up_act(case: tuple[int, list[Triple], int], k: int, n: int, dtype: torch.dtype, bias: bool) -> None:
    rows, triples, seed = case
    draw = Draw(seed)
    pair = Pair([n, n], k, dtype, draw, bias=bias)
    own, plain = pair.steps(step_input(tokens=rows, adapters={"tokens": triples}))
    x = draw.tensor(rows, k, dtype=dtype)
    got = pair.machine.operator("gate_up_act")(x, pair.weight, own, "silu")
    # A gate or an up that nearly cancels is off by a rounding of its parts, and the other one multiplies that.
    parts = pair.base(x), pair.body("column_linear")(x, pair.plain_weight, plain)
    expected = pair.body("gate_up_act")(x, pair.plain_weight, plain, "silu")
    assert_alike(got, expected, dtype, largest_of(*parts) ** 2)


@given(case=station_case(), k=st.integers(1, 20), n=st.integers(1, 9), dtype=DTYPE, bias=st.booleans())
def test_row_parallel_stations(
    case: tuple[int, list[Triple], int], k: int, n: int, dtype: torch.dtype, bias: bool
) -> None:
    rows, triples, seed = case
    draw = Draw(seed)
    pair = Pair([n], k, dtype, draw, bias=bias)
    own, plain = pair.steps(step_input(tokens=rows, adapters={"tokens": triples}))
    x, residual = draw.tensor(rows, k, dtype=dtype), draw.tensor(rows, n, dtype=dtype)
    norm_weight, before = draw.tensor(n, dtype=dtype), residual.clone()
    comm = SingleRank()
    got = pair.machine.operator("row_parallel_linear")(x, pair.weight, own, comm)
    size = largest_of(pair.base(x), residual)
    assert_alike(got, pair.body("row_parallel_linear")(x, pair.plain_weight, plain, comm), dtype, size)
    arguments = (comm, residual, norm_weight, 1e-5)
    normed, s = pair.machine.operator("row_parallel_add_norm")(x, pair.weight, own, *arguments)
    plain_normed, plain_s = pair.body("row_parallel_add_norm")(x, pair.plain_weight, plain, *arguments)
    assert_alike(s, plain_s, dtype, size)
    assert torch.equal(residual, before), "the residual was changed"
    if rows and float(f64(plain_s).__abs__().max()) > 0.1:
        root = np.sqrt((f64(s) ** 2).mean(-1, keepdims=True) + 1e-5)
        expected = torch.from_numpy(f64(s) / root * f64(norm_weight)).to(dtype)
        assert_alike(normed, expected, dtype)
    assert normed.shape == plain_normed.shape


@given(
    case=station_case(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    half=st.integers(1, 4),
    extra=st.sampled_from([0, 1, 4]),
    style=st.sampled_from(["half", "interleaved"]),
    norms=st.booleans(),
    dtype=DTYPE,
)
def test_qkv_rope_cache(
    case: tuple[int, list[Triple], int],
    heads: tuple[int, int],
    half: int,
    extra: int,
    style: str,
    norms: bool,
    dtype: torch.dtype,
) -> None:
    rows, triples, seed = case
    draw = Draw(seed)
    (q_heads, kv_heads), head_dim = heads, 2 * half + extra
    pair = Pair([q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], 10, dtype, draw)
    angles = draw.tensor(50, half)
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=2 * half, style=style)  # type: ignore[arg-type]
    spec = KVSpec(layers=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, blocks=4, block_size=4)
    caches = (pair.machine.cache(spec), pair.plain.allocate_kv(spec, CPU))
    slots = np.where(draw.generator.random(rows) < 0.2, -1, draw.generator.permutation(16)[:rows])
    positions = draw.generator.integers(0, 50, rows)
    inputs = step_input(
        tokens=rows, positions=positions.tolist(), kv_slots=slots.tolist(), adapters={"tokens": triples}
    )
    own, plain = pair.steps(inputs, caches)
    x = draw.tensor(rows, 10, dtype=dtype)
    weights = (draw.tensor(head_dim, dtype=dtype), draw.tensor(head_dim, dtype=dtype)) if norms else (None, None)
    station = pair.machine.operator("qkv_rope_cache")
    got = station(x, pair.weight, own, rope, *weights, 1e-5, caches[0], 1, head_dim)
    operators = {**pair.plain.composites(), "linear": pair.plain.table()["linear"][0].fn}
    if not norms:
        del operators["rms_norm"]
    body = stations.build("qkv_rope_cache", operators)
    expected = body(x, pair.plain_weight, plain, rope, *weights, 1e-5, caches[1], 1, head_dim)
    # A norm divides by a length that may be small, which enlarges the product's rounding.
    if not norms:
        assert_alike(got, expected, dtype)
        for mine, theirs in zip(*(cache.read(1, torch.arange(16)) for cache in caches), strict=True):
            assert_alike(mine, theirs, dtype)
    elif dtype == torch.float32:
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert got.shape == (rows, q_heads, head_dim)


@given(
    rows=st.integers(0, 5), heads=st.integers(1, 4), head_dim=st.integers(1, 40), dtype=DTYPE, seed=st.integers(0, 99)
)
def test_a_norm_in_place_gives_the_bits_of_one_that_is_not(
    rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    draw = Draw(seed)
    wide = draw.tensor(rows, heads + 2, head_dim, dtype=dtype)
    weights, eps = draw.tensor(heads, head_dim, dtype=dtype), torch.tensor(1e-5)
    apart = [dense.rms_norm(wide[:, i], weights[i], eps) for i in range(heads)]
    beyond = wide[:, heads:].clone()
    dense.rms_norm_(wide[:, :heads], weights, eps)
    assert all(torch.equal(wide[:, i], one) for i, one in enumerate(apart))
    assert torch.equal(wide[:, heads:], beyond)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_ledger_shows_what_was_launched_and_copied(adapted: bool) -> None:
    draw = Draw(1)
    pair = Pair([4, 4], 6, torch.float32, draw)
    triples = [(0, 0, 1.0), (1, 1, 1.0)] if adapted else []
    own, _ = pair.steps(step_input(tokens=2, adapters={"tokens": triples}))
    x = columns_first(draw.tensor(2, 6))
    pair.machine.operator("gate_up_act")(x, pair.weight, own)
    expected = {"copy.gate_up_act.x": 1, **({"cpu.sgmv": 1} if adapted else {}), "cpu.gate_up_act": 1}
    assert pair.machine.backend.ledger.counts() == expected


def test_a_station_gives_the_same_bits_every_time() -> None:
    draw = Draw(2)
    pair = Pair([40, 40], 33, torch.float32, draw)
    x = draw.tensor(5, 33)
    inputs = step_input(tokens=5, adapters={"tokens": [(row, row % 3, 1.0) for row in range(5)]})
    results = [pair.machine.operator("gate_up_act")(x, pair.weight, pair.steps(inputs)[0]) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
