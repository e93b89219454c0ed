"""The problem sets of operators on rows and sequences: complete, closed under mending, passed by healthy backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import Backend, TableBackend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.activation import GeluProblems, SiluAndMulProblems
from polyaccel_conformance.problems.attention import DenseAttentionProblems, PagedAttentionProblems
from polyaccel_conformance.problems.kv_cache import WriteKVCacheProblems
from polyaccel_conformance.problems.norm import LayerNormProblems, RmsNormProblems
from polyaccel_conformance.problems.rotary import RotaryProblems
from polyaccel_conformance.problems.select_rows import SelectRowsProblems
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import mending_faults, problems, undrawn, verdict

BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composite": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}
SETS = (
    SiluAndMulProblems(),
    GeluProblems(),
    PagedAttentionProblems(),
    DenseAttentionProblems(),
    RmsNormProblems(),
    LayerNormProblems(),
    RotaryProblems(),
    SelectRowsProblems(),
    WriteKVCacheProblems(),
)


@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_every_argument_and_attribute_is_a_drawn_axis(problem_set: ProblemSet) -> None:
    assert undrawn(problem_set) == []


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_every_combination_of_axes_is_a_case(problem_set: ProblemSet, data: st.DataObject) -> None:
    assert mending_faults(problem_set, lambda values: data.draw(st.sampled_from(list(values)))) == []


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_healthy_backends_pass(problem_set: ProblemSet, name: str, count: int) -> None:
    bench = Bench(BACKENDS[name]())
    found = [(p.case, failure) for p in problems(problem_set, count, 100) if (failure := verdict(bench, p))]
    assert found == []
