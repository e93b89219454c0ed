"""Problems drawn from a problem set's axes, and how far an emulated implementation is from the oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polyaccel.backend import OPERATORS
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import Failure
from polyaccel_conformance.checks.values import VALUE_CHECKS
from polyaccel_conformance.compare import headroom
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.multi.registry import ranked_set
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Problem, ProblemSet
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.trial import Trial
from polyaccel_conformance.words import Source

Floats = npt.NDArray[np.float64]
Emulation = Callable[[Problem], Mapping[str, Floats]]
Ratio = Callable[[Problem, Emulation], float]


def problem_set(operator: str) -> ProblemSet:
    """The cases of an operator, a station or what only ranks do."""
    return PROBLEM_SETS.get(operator) or ranked_set(operator)


def problems(problem_set: ProblemSet, count: int, seed: int, **choices: tuple[Choice, ...]) -> Iterator[Problem]:
    """``count`` problems with axes drawn at random, those named (dots as double underscores) from ``choices``."""
    axes = {**problem_set.axes(), **{name.replace("__", "."): values for name, values in choices.items()}}
    for i in range(count):
        source = Source(seed + i)
        drawn = {name: values[int(source.integers(name, (1,), 0, len(values) - 1)[0])] for name, values in axes.items()}
        mended = problem_set.mend(drawn)
        assert mended is not None
        yield problem_set.problem(Case.of(problem_set.operator, mended, seed + i))


def operand(problem: Problem, name: str) -> Floats:
    return problem.operands[name].values.astype(np.float64)


def remembered(problem: Problem) -> Problem:
    """The problem, asking its oracle once."""
    problem.expected = functools.cache(problem.expected)  # type: ignore[method-assign]
    return problem


def worst(problem: Problem, outputs: Mapping[str, Floats]) -> float:
    """The largest err / tol over all outputs that are numbers, each rounded to its format first; infinite for a wrong
    exact one."""
    ratios = [0.0]
    with np.errstate(all="ignore"):
        for name, expected in problem.expected().items():
            if isinstance(expected, Expected):
                ratios.append(headroom(expected, FORMATS[expected.format.name].round(outputs[name])))
    return max(ratios)


def bound_ratio(problem: Problem, emulate: Emulation) -> float:
    """:func:`worst` of an emulation."""
    return worst(problem, emulate(problem))


def survey(
    emulations: Mapping[str, Emulation], drawn: Iterator[Problem], ratio: Ratio = bound_ratio
) -> dict[str, float]:
    """The worst err / tol of each emulation over all problems."""
    found = dict.fromkeys(emulations, 0.0)
    with np.errstate(all="ignore"):
        for problem in map(remembered, drawn):
            for name, emulate in emulations.items():
                found[name] = max(found[name], ratio(problem, emulate))
    return found


def undrawn(problem_set: ProblemSet) -> list[str]:
    """Tensor arguments, attributes, optional arguments and permitted aliases of the contract that no axis draws."""
    axes, missing = problem_set.axes(), []
    for argument in OPERATORS[problem_set.operator].arguments:
        name = argument.name
        wanted = {"tensor": f"layouts.{name}", "attribute": f"attributes.{name}"}.get(argument.kind)
        if wanted is not None and wanted not in axes:
            missing.append(wanted)
        if argument.optional and f"structure.{name}" not in axes:
            missing.append(f"structure.{name}")
        missing += [f"alias {name}={x}" for x in argument.may_alias if f"{name}={x}" not in axes.get("alias", ())]
        if argument.values:
            drawn = set(axes.get(f"attributes.{name}", ()))
            missing += [f"{name}={value}" for value in argument.values if value not in drawn]
    return missing


def verdict(bench: Bench, problem: Problem) -> Failure | None:
    """What the checks of values say."""
    trial = Trial(bench, problem)
    applied = [check for check in VALUE_CHECKS.values() if check.applies(problem.case, problem)]
    assert applied
    return next((failure for check in applied if (failure := check.run(trial)) is not None), None)


def mending_faults(problem_set: ProblemSet, draw: Callable[[Sequence[Choice]], Choice]) -> list[str]:
    """What is wrong with a drawn combination: mending it has no end, its case does not survive its file, or it holds
    operands that their dtype does not."""
    mended = problem_set.mend({name: draw(values) for name, values in problem_set.axes().items()})
    if mended is None:
        return ["has no meaning"]
    case = Case.of(problem_set.operator, mended, 1)
    faults = [] if problem_set.mend(dict(mended)) == mended else ["mending twice changes more"]
    faults += [] if Case.from_json(case.to_json()) == case else ["the case does not survive its file"]
    for name, item in problem_set.problem(case).operands.items():
        values = item.values
        if item.dtype in FORMATS and not np.array_equal(FORMATS[item.dtype].round(values), values, equal_nan=True):
            faults.append(f"{name} is not representable")
    return faults
