"""A row alone, or a sequence alone, against its batch: for every operator whose rows share a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from polyaccel.backend import Backend, Entry, TableBackend, load
from polyaccel.backend.errors import ConfigurationError
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.checks.invariance import ROW_BY_ROW
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.subject import BATCH_INVARIANT, Subject
from polyaccel_conformance.trial import Trial
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems
from tests.conformance.oracle.subjects import SUBJECTS

CHECK = CHECKS["invariance.batch"]
HERE = {"device": ("current",), "stream": ("default",)}
BACKENDS: Mapping[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composites": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}
EXACT = ("integers", "cancelling", "selection", "permutation")
# Its problems compare a row alone themselves.
OWN = {"sample"}
OPERATORS = [name for name in SUBJECTS if name in PROBLEM_SETS and name not in OWN]
SMALL = {"dims__tokens": (2, 3, 7), "dims__sequences": (2, 3), "dims__context": (2, 17, 33), "dims__rank": (2, 8)}


def drawn(operator: str, count: int, **axes: tuple[Any, ...]) -> list[Any]:
    known = PROBLEM_SETS[operator].axes()
    named = {name: values for name, values in {**SMALL, **HERE, **axes}.items() if name.replace("__", ".") in known}
    found = problems(PROBLEM_SETS[operator], count, 17, **named)
    return [problem for problem in found if CHECK.applies(problem.case, problem)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_healthy_operators_give_a_row_of_exact_data_the_same_bits_alone(operator: str, backend: str) -> None:
    bench, exact = Bench(BACKENDS[backend]()), 0
    for problem in drawn(operator, 16):
        trial = Trial(bench, problem)
        assert CHECK.run(trial) is None, problem.case
        exact += problem.exact
        trial.close()
    assert exact > 0


def growing(fn: Callable[..., Any], rows_of: Callable[[Any], int]) -> Callable[..., Any]:
    """A result that grows with the number of rows."""

    def wrong(*arguments: Any) -> Any:
        result = fn(*arguments)
        more = rows_of(result)
        if isinstance(result, tuple):
            return tuple(part + more for part in result)
        return result.add_(more)

    return wrong


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in ROW_BY_ROW])
def test_a_result_that_depends_on_the_number_of_rows_is_found(operator: str) -> None:
    class Growing(Bench):
        def resolve(self, name: str, prepared: Any) -> Any:
            resolved = super().resolve(name, prepared)
            if name != operator:
                return resolved
            return replace(resolved, call=growing(resolved.call, lambda r: len(r[0] if isinstance(r, tuple) else r)))

    kinds = {"data": tuple(k for k in PROBLEM_SETS[operator].axes()["data"] if k in EXACT)}
    causes = set()
    for problem in drawn(operator, 8, **kinds):
        if problem.exact:
            found = CHECK.run(Trial(Growing(TableBackend("cpu", {})), problem))
            causes.add("" if found is None else found.cause)
    assert "depends on the batch" in causes


def test_what_is_not_promised_is_noted() -> None:
    (problem, *_) = drawn("sgmv", 8, data=("normal",), structure__segments=("one",))
    fn = TableBackend("cpu", {}).composites()["sgmv"]
    bench = Bench(TableBackend("cpu", {"sgmv": Entry(growing(fn, len))}))
    trial = Trial(bench, problem)
    assert CHECK.run(trial) is None
    assert CHECK.notes(trial) == ("batch: not invariant",)


def test_a_backend_that_promises_it_is_held_to_it_on_any_data() -> None:
    class Growing(Bench):
        def resolve(self, name: str, prepared: Any) -> Any:
            resolved = super().resolve(name, prepared)
            return replace(resolved, call=growing(resolved.call, len)) if name == "linear" else resolved

    found = {False: 0, True: 0}
    for promised in found:
        backend = TableBackend("cpu", {})
        backend.batch_invariant = promised
        for problem in drawn("linear", 8, data=("normal",)):
            found[promised] += CHECK.run(Trial(Growing(backend), problem)) is not None
    assert not found[False]
    assert found[True]


def test_a_backend_that_cannot_promise_it_is_not_opened_with_it() -> None:
    subject = Subject(name="cpu", promise=BATCH_INVARIANT)
    assert Subject.from_json(subject.to_json()) == subject
    with pytest.raises(ConfigurationError, match="cannot promise"):
        subject.open()
