"""Weights, caches and adapters that a call may not change, and their room that it may not read."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from polyaccel.backend import TableBackend
from polyaccel.backend.composite import attention, lora
from polyaccel.backend.composite.linear import dequantize, linear
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.checks.memory import MEMORY_CHECKS
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.trial import POISONED, Trial
from tests.conformance.checks.wrong import Function, bench_of, failing

SGMV = ("aten::mm", "aten::mul", "aten::add_", "aten::index_select", "aten::index_add_")
MEMORY = tuple(MEMORY_CHECKS.values())


def _problem(operator: str, seed: int = 3, **wanted: Any) -> Problem:
    """The first drawn case that has the wanted axis values."""
    problems, draw = PROBLEM_SETS[operator], random.Random(seed)
    wanted = {path.replace("__", "."): value for path, value in wanted.items()}
    for _ in range(1000):
        axes = {path: draw.choice(list(values)) for path, values in problems.axes().items()} | wanted
        mended = problems.mend(axes)
        if mended is not None and all(mended.get(path) == value for path, value in wanted.items()):
            return problems.problem(Case.of(operator, mended, seed))
    raise AssertionError(f"no case of {operator} has {wanted}")


def _attention(change: Function) -> Function:
    def wrong(q: torch.Tensor, kv: Any, layer: int, step: Any, scale: float, window: int | None = None) -> torch.Tensor:
        out = attention.paged_attention(q, kv, layer, step, scale, window)
        changed: torch.Tensor = change(out, kv, layer, step)
        return changed

    return wrong


def _changes_a_key(out: torch.Tensor, kv: Any, layer: int, step: Any) -> torch.Tensor:
    slot = torch.zeros(1, dtype=torch.int64)
    k, v = kv.read(layer, slot)
    kv.write(layer, slot, torch.ones_like(k) * 3, v)
    return out


def _reads_unreached_slots(out: torch.Tensor, kv: Any, layer: int, step: Any) -> torch.Tensor:
    slots = torch.arange(kv.spec.blocks * kv.spec.block_size)
    k, _ = kv.read(layer, slots)
    spoiled: torch.Tensor = out + 0 * k.sum().to(out.dtype)
    return spoiled


def _problem_of_attention() -> Problem:
    return _problem("paged_attention", dtype="float32", data="normal", dims__context=17, dims__sequences=3)


def test_a_call_that_changes_the_cache_it_only_reads_is_found() -> None:
    problem = _problem_of_attention()
    assert failing(bench_of(_attention(_changes_a_key), "paged_attention"), problem, MEMORY) == {
        "memory.inputs": "changes state"
    }


def test_reading_cache_slots_that_no_sequence_reaches_is_found() -> None:
    problem = _problem_of_attention()
    found = failing(bench_of(_attention(_reads_unreached_slots), "paged_attention"), problem, MEMORY)
    assert set(found) <= {"memory.reads", "memory.unwritten"}
    assert found


def test_the_composite_of_attention_touches_nothing() -> None:
    assert failing(bench_of(attention.paged_attention, "paged_attention"), _problem_of_attention(), MEMORY) == {}


def test_a_weight_that_a_call_changes_is_found() -> None:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        y = linear(x, weight)
        dequantize(weight)[0, 0] += 1
        return y

    assert failing(bench_of(wrong), checks=MEMORY)["memory.inputs"] == "changes state"


def test_an_adapter_that_a_call_changes_is_found() -> None:
    def wrong(y: torch.Tensor, x: torch.Tensor, weight: Any, step: Any, row_set: Any = "tokens") -> torch.Tensor:
        result = lora.sgmv(y, x, weight, step, row_set)
        for slot, where in enumerate(step.state.adapters.ranges()):
            if where is not None and (matrices := step.state.adapters.read(weight.spec.site, 0, slot)) is not None:
                matrices.b.add_(1)
        return result

    problem = _problem("sgmv", dtype="float32", data="normal", dims__tokens=7, structure__segments="each")
    assert failing(bench_of(wrong, "sgmv"), problem, MEMORY) == {"memory.inputs": "changes state"}
    assert failing(bench_of(lora.sgmv, "sgmv"), problem, MEMORY) == {}


def test_reading_an_adapter_that_the_step_does_not_name_is_found() -> None:
    def wrong(y: torch.Tensor, x: torch.Tensor, weight: Any, step: Any, row_set: Any = "tokens") -> torch.Tensor:
        store = step.state.adapters
        result = lora.sgmv(y, x, weight, step, row_set)
        for slot in range(store.slots):
            matrices = store.read(weight.spec.site, 0, slot)
            if matrices is not None:
                result.add_(0 * matrices.b.sum())
        return result

    problem = _problem("sgmv", dtype="float32", data="normal", dims__tokens=7, structure__segments="each")
    found = failing(bench_of(wrong, "sgmv"), problem, MEMORY)
    assert found == {"memory.reads": "reads memory that is not its own"}


def test_the_cache_a_call_writes_may_change_at_the_slots_of_the_step_only() -> None:
    problem = _problem("write_kv_cache", dtype="float32", data="normal", dims__tokens=7)

    def wrong(k: torch.Tensor, v: torch.Tensor, kv: Any, layer: int, step: Any) -> None:
        attention.write_kv_cache(k, v, kv, layer, step)
        free = next(s for s in range(kv.spec.blocks * kv.spec.block_size) if s not in step.input.kv_slots.tolist())
        kv.write(layer, torch.tensor([free]), k[:1] + 1, v[:1] + 1)

    assert failing(bench_of(wrong, "write_kv_cache"), problem, MEMORY) == {"memory.inputs": "changes state"}
    assert failing(bench_of(attention.write_kv_cache, "write_kv_cache"), problem, MEMORY) == {}


class TestNativeLora:
    """``lora.native_evidence``: the check of the founding case."""

    CHECK = (CHECKS["lora.native_evidence"],)

    @pytest.mark.parametrize("rank", [1, 15, 16, 17, 128])
    def test_falling_back_inside_for_ranks_that_are_no_multiple_of_16_is_found(self, rank: int) -> None:
        table: dict[str, Function] = {"native": lora.sgmv}

        def native(y: Any, x: Any, weight: Any, step: Any, row_set: Any = "tokens") -> object:
            return table["composite" if rank % 16 else "native"](y, x, weight, step, row_set)

        bench = bench_of(native, "sgmv", evidence=SGMV)
        table["composite"] = bench.backend.composites()["sgmv"]
        problem = _problem("sgmv", dims__rank=rank, structure__ranks="equal", structure__segments="one", dims__tokens=7)
        expected = {self.CHECK[0].name: "nested composite"} if rank % 16 else {}
        assert failing(bench, problem, self.CHECK) == expected

    def test_refusing_a_rank_is_found_with_the_reason(self) -> None:
        def supports(query: Any) -> list[str]:
            rank = query.integer("largest_rank")
            return [f"rank {rank} is no power of two"] if rank & (rank - 1) else []

        bench = bench_of(lora.sgmv, "sgmv", supports=supports, evidence=("aten::mm",))
        problem = _problem("sgmv", dims__rank=15, structure__ranks="equal", structure__segments="one", dims__tokens=7)
        assert failing(bench, problem, self.CHECK) == {self.CHECK[0].name: "planned as a composite"}

    def test_refusing_narrow_slices_of_a_share_is_found(self) -> None:
        def supports(query: Any) -> list[str]:
            slices = query.static["slices"]
            return ["slices below 16 rows are not taken"] if min(slices) < 16 else []

        bench = bench_of(lora.sgmv, "sgmv", supports=supports, evidence=SGMV)
        problem = _problem("sgmv", dims__rank=8, dims__n=33, structure__slices="one", structure__segments="one")
        assert failing(bench, problem, self.CHECK) == {self.CHECK[0].name: "a share is refused"}

    def test_a_backend_without_sgmv_is_not_asked(self) -> None:
        bench = Bench(TableBackend("cpu", {}))
        assert failing(bench, _problem("sgmv", dims__rank=8), self.CHECK) == {}


def test_snapshots_are_taken_once_of_what_exists() -> None:
    observation = Trial(Bench(TableBackend("cpu", {})), _problem_of_attention()).observe(POISONED)
    assert observation.disturbed == {}
    assert observation.activity is not None
    assert observation.activity.dispatched > 0
