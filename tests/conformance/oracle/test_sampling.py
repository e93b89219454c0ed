"""Which ids and log-probabilities are accepted: those of every legitimate implementation, and of no coarser one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from polyaccel_conformance.oracle.sampling import Distribution, Row
from polyaccel_conformance.problems.sample import SampleProblem, SampleProblems
from tests.conformance.drawn import problems
from tests.conformance.emulated_sampling import SAMPLERS, Round, emulated_id
from tests.conformance.emulation import BF16, F16
from tests.conformance.oracle.golden import row_of

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "sampling.json").read_text())


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
def test_ids_agree_with_what_was_found_by_hand(golden: Mapping[str, object]) -> None:
    distribution = Distribution(row_of(golden))
    for uniform, token in zip(golden["uniforms"], golden["ids"], strict=True):  # type: ignore[call-overload]
        chosen = distribution.choose(uniform)
        assert chosen.clear
        assert chosen.ids.tolist() == [token], uniform


def test_log_probabilities_agree_with_what_was_found_by_hand() -> None:
    """1/8, 4/8, 2/8, 1/8: minus 3, 1, 2, 3 times ln 2; temperature and filters leave them alone."""
    row = row_of(GOLDENS[0] | {"temperature": 0.5, "top_k": 1})
    np.testing.assert_allclose(Distribution(row).logprobs.value, -np.log(2) * np.array([3, 1, 2, 3]), rtol=1e-14)


def test_a_uniform_on_a_boundary_is_ambiguous_unless_nothing_is_rounded() -> None:
    row = dict(GOLDENS[1], top_k=0)
    assert Distribution(row_of(row)).choose(0.25).ids.tolist() == [0, 1]
    exact = row_of(row)
    exact = Row(**{name: getattr(exact, name) for name in Row.__slots__ if name != "exact"}, exact=True)
    assert [Distribution(exact).choose(i / 4).ids.tolist() for i in range(4)] == [[0], [1], [2], [3]]


# -- emulated implementations ------------------------------------------------------------------------------------------


def rows(count: int, seed: int, **axes: tuple[object, ...]) -> list[tuple[Distribution, float]]:
    drawn = problems(SampleProblems(), count, seed, dims__rows=(3, 8), structure__alone=(False,), **axes)  # type: ignore[arg-type]
    return [
        (distribution, request.uniform)
        for problem in drawn
        if isinstance(problem, SampleProblem)
        for distribution, request in zip(problem.distributions, problem.requests, strict=True)
    ]


@pytest.mark.parametrize("form", SAMPLERS)
def test_every_legitimate_implementation_is_accepted(form: str) -> None:
    wrong = []
    for distribution, uniform in rows(200, 31):
        chosen = distribution.choose(uniform)
        got = SAMPLERS[form].choose(distribution.row, uniform)
        if chosen.clear and got not in chosen.ids:
            wrong.append((uniform, got, chosen.ids))
    assert not wrong


def test_few_rows_are_ambiguous() -> None:
    drawn = rows(400, 32)
    ambiguous = sum(not d.choose(u).clear or len(d.choose(u).ids) > 1 for d, u in drawn)
    assert ambiguous <= 0.01 * len(drawn)


@pytest.mark.parametrize("lower", [BF16.round, F16.round], ids=["bfloat16", "float16"])
def test_masses_in_a_lower_class_give_ids_that_are_not_accepted(lower: Round) -> None:
    drawn = rows(80, 33, data=("normal",), attributes__temperature=(1.0,))
    accepted = [emulated_id(d.row, u, to=lower) in d.choose(u).ids for d, u in drawn if d.choose(u).clear]
    assert not all(accepted)


def neighbours_accepted(order: Callable[[Row], Row]) -> float:
    """Share of rows whose id under other rules is still accepted."""
    drawn = rows(150, 34, structure__rows=("same",), attributes__temperature=(0.5, 1.75))
    return float(np.mean([emulated_id(order(d.row), u) in d.choose(u).ids for d, u in drawn]))


@pytest.mark.parametrize("changed", ["temperature", "top_k", "top_p", "min_p"])
def test_a_filter_that_is_left_out_is_seen(changed: str) -> None:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}[changed]

    def without(row: Row) -> Row:
        return Row(**{name: neutral if name == changed else getattr(row, name) for name in Row.__slots__})

    assert neighbours_accepted(without) < 1
