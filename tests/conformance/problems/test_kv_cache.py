"""The problems of write_kv_cache: complete, passed by healthy backends, failed by planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import Backend, KVCache, TableBackend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.kv_cache import LAYERS, WriteKVCacheProblems
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems, undrawn, unmended, verdict

BACKENDS: tuple[Callable[[], Backend], ...] = (lambda: load("cpu"), lambda: TableBackend("cpu", {}), FoldedBackend)
NAMES = ("cpu", "composite", "folded")
SETS = (WriteKVCacheProblems(),)


@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_every_argument_and_attribute_is_a_drawn_axis(problem_set: ProblemSet) -> None:
    assert undrawn(problem_set) == []


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_every_combination_of_axes_is_a_case(problem_set: ProblemSet, data: st.DataObject) -> None:
    unmended(problem_set, lambda values: data.draw(st.sampled_from(list(values))))


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_healthy_backends_pass(problem_set: ProblemSet, backend: Callable[[], Backend], count: int) -> None:
    bench = Bench(backend())
    found = [(p.case, failure) for p in problems(problem_set, count, 100) if (failure := verdict(bench, p))]
    assert found == []


Write = Callable[[torch.Tensor, torch.Tensor, KVCache, int, Any], None]


def into_slot_zero(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(layer, step.tensor("kv_slots").clamp(min=0), k, v)


def into_the_other_layer(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(LAYERS - 1 - layer, step.tensor("kv_slots"), k, v)


def swapped(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(layer, step.tensor("kv_slots"), v, k)


def without_the_last(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(layer, step.tensor("kv_slots")[:-1], k[:-1], v[:-1])


def also_the_next_slot(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    slots = step.tensor("kv_slots")
    most = kv.spec.blocks * kv.spec.block_size - 1
    kv.write(layer, torch.where(slots < 0, slots, (slots + 1).clamp(max=most)), k, v)
    kv.write(layer, slots, k, v)


@pytest.mark.parametrize(
    ("wrong", "unstored"),
    [
        (into_slot_zero, "all"),
        (into_the_other_layer, "none"),
        (swapped, "none"),
        (without_the_last, "none"),
        (also_the_next_slot, "none"),
    ],
)
def test_a_wrong_write_fails(wrong: Write, unstored: str) -> None:
    bench = Bench(TableBackend("cpu", {"write_kv_cache": wrong}))
    where = {"dims__tokens": (7,), "structure__unstored": (unstored,), "data": ("normal", "nonfinite")}
    assert all(verdict(bench, p) for p in problems(WriteKVCacheProblems(), 6, 7, **where))
