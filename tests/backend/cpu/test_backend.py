from __future__ import annotations

import numpy as np
import pytest
import torch

from polyaccel.backend import registry
from polyaccel.backend.cpu.backend import CpuBackend
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.plan import Plan, SiteRequest
from polyaccel.backend.stations import STATIONS
from polyaccel.backend.step import DeviceState
from polyaccel.backend.table import TableBackend
from polyaccel.backend.vocabulary import OPERATORS
from tests.backend.composite.cases import CPU, Draw, Module, assert_within, f64, spec_of, step_input
from tests.backend.cpu.machine import Machine


def test_it_is_registered_and_always_usable() -> None:
    backend = registry.choose("cpu")
    assert isinstance(backend, CpuBackend)
    assert (backend.name, backend.priority) == ("cpu", 0)
    assert backend.probe().usable
    assert [device.name for device in backend.devices()] == ["cpu"]


def test_every_operator_and_station_is_native() -> None:
    assert sorted(CpuBackend().operators()) == sorted([*OPERATORS, *STATIONS])


def test_every_entry_declares_what_it_may_execute() -> None:
    entries = {name: entry for name, found in CpuBackend().table().items() for entry in found}
    assert [name for name, entry in entries.items() if not entry.evidence] == []
    declared = {operator for entry in entries.values() for operator in entry.evidence}
    assert [operator for operator in declared if operator.count("::") != 1] == []


def test_strict_plans_have_fused_stations_and_no_composites() -> None:
    static = {"dtype": "float32", "heads": 9, "kv_heads": 3, "head_dim": 64, "rotary_dim": 64, "act": "silu"}
    requests = [SiteRequest(site=name, operator=name, static=static) for name in [*STATIONS, *OPERATORS]]
    plan = Plan(CpuBackend(), requests, policy="strict")
    for name in STATIONS:
        assert {planned.kind for planned in plan[name].planned} == {"fused"}
    for name in OPERATORS:
        assert {planned.kind for planned in plan[name].planned} == {"native"}


@pytest.mark.parametrize(
    ("station", "static", "reason"),
    [
        ("gate_up_act", {"act": "gelu"}, "'gelu'"),
        ("qkv_rope_cache", {"head_dim": 8, "rotary_dim": 10}, "rotary_dim 10"),
        ("paged_attention", {"heads": 4, "kv_heads": 3}, "no multiple of 3"),
    ],
)
def test_what_it_cannot_do_it_refuses_with_the_value(station: str, static: dict[str, int | str], reason: str) -> None:
    plan = Plan(CpuBackend(), [SiteRequest(site="s", operator=station, static=static)], policy="allow")
    for planned in plan["s"].planned:
        assert planned.kind != "fused"
        assert any(reason in text for text in planned.reasons)


def test_objects_of_another_backend_are_refused_by_name() -> None:
    backend, other = CpuBackend(), TableBackend("cpu", {})
    step = other.begin_step(step_input(tokens=1), DeviceState(), CPU)
    weight = backend.allocate_weight(spec_of("w", [4], 3), CPU)
    weight.seal()
    table = backend.table()
    with pytest.raises(OperatorError, match="TensorStep"):
        table["column_linear"][0].fn(torch.ones(1, 3), weight, step)
    with pytest.raises(OperatorError, match="TensorWeight"):
        table["linear"][0].fn(torch.ones(1, 3), other.allocate_weight(spec_of("w", [4], 3), CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 17), (2, 3, 8)])
def test_rms_norm_with_and_without_a_residual(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw, backend = Draw(3), CpuBackend()
    x, residual = draw.tensor(*shape, dtype=dtype), draw.tensor(*shape, dtype=dtype)
    weight = draw.tensor(shape[-1], dtype=dtype)
    norm = backend.table()["rms_norm"][0].fn
    normed, s = norm(x, weight, 1e-5, residual)
    assert torch.equal(s, (x.float() + residual.float()).to(dtype))
    for got, source in ((normed, s), (norm(x, weight, 1e-5), x)):
        wide = f64(source)
        expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * f64(weight)
        assert got.dtype == dtype
        assert_within(got, expected, np.abs(expected), depth=shape[-1])


def test_embedding_of_a_rank_without_rows_is_zeros() -> None:
    machine = Machine()
    weight, _ = machine.weight(spec_of("embedding", [0], 4, lookup=True), Draw(4))
    step = machine.begin(step_input(tokens=2, token_ids=[0, 3]))
    assert torch.equal(machine.operator("embedding")(weight, step, 0), torch.zeros(2, 4))


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("adapted", [False, True])
def test_embedding_gives_zeros_for_ids_of_other_ranks(start: int, adapted: bool) -> None:
    draw, machine = Draw(4), Machine()
    spec = spec_of("embedding", [5], 4, rank_rows=4, lookup=True)
    weight, values = machine.weight(spec, draw)
    store, packed = machine.store({"embedding": weight}, {0: [Module("embedding", 0, 2)]}, draw)
    a, b = (f64(m) for m in (packed[0].a(packed[0].entries[0]), packed[0].b(packed[0].entries[0])))
    ids = [0, 4, 7, 2, 9]
    triples = [(0, 0, 1.0), (1, 0, 0.5), (4, 0, 1.0)] if adapted else []
    step = machine.begin(step_input(tokens=5, token_ids=ids, adapters={"tokens": triples}), adapters=store)
    got = machine.operator("embedding")(weight, step, start)
    expected = np.zeros((5, 4))
    for row, local in enumerate(i - start for i in ids):
        if 0 <= local < 5:
            expected[row] = values[local, :4]
            expected[row] += sum(mix * (b @ a[:, local]) for r, _, mix in triples if r == row)
    assert_within(got, expected, np.abs(expected) + 10, depth=4)
