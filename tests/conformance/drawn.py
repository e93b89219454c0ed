"""Problems drawn from a problem set's axes, and how far an emulated implementation is from the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.compare import headroom
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Problem, ProblemSet
from polyaccel_conformance.words import Source

Floats = npt.NDArray[np.float64]
Emulation = Callable[[Problem], Mapping[str, Floats]]


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


def worst(problem: Problem, outputs: Mapping[str, Floats]) -> float:
    """The largest err / tol over all outputs, each rounded to its format first."""
    ratios = [0.0]
    with np.errstate(all="ignore"):
        for name, expected in problem.expected().items():
            assert isinstance(expected, Expected)
            ratios.append(headroom(expected, FORMATS[expected.format.name].round(outputs[name])))
    return max(ratios)


def survey(emulations: Mapping[str, Emulation], drawn: Iterator[Problem]) -> dict[str, float]:
    """The worst err / tol of each emulation over all problems."""
    found = dict.fromkeys(emulations, 0.0)
    for problem in drawn:
        for name, emulate in emulations.items():
            with np.errstate(all="ignore"):
                found[name] = max(found[name], worst(problem, emulate(problem)))
    return found
