"""Questions about a device and its storage that no single operator answers, asked case by case like any other.

A case of such a question drives methods of the contract (``Device.upload``, ``Weight.write``) and collects facts: named
statements, each true or false. It is drawn, shrunk, saved and replayed as a case of an operator of the question's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import OperatorError, OperatorSpec
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import Check, Control, Failure, Level
from polyaccel_conformance.formats import bits_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Exactly, Outputs, Prepared, Problem, ProblemSet
from polyaccel_conformance.trial import Trial

FACTS = "facts"


class Facts:
    """Statements about one drive of a case, in order.

    Attributes:
        names: of all statements; ``wrong``: what was found instead, by name; ``notes``: what the device does not offer.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.wrong: dict[str, str] = {}
        self.notes: list[str] = []

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        """State something; ``detail`` says what was found where it does not hold."""
        self.names.append(name)
        if not holds:
            self.wrong[name] = detail

    def same(self, name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Equal shape, dtype and bits; ``got`` has arrived, on whatever device."""
        self.check(name, *_compare(got, wanted))

    def refused(self, name: str, call: Callable[[], object], value: str) -> None:
        """A typed error that names the value."""
        try:
            call()
        except OperatorError as error:
            self.check(name, value in str(error), f"the error does not name {value!r}: {error}")
        except Exception as error:
            self.check(name, False, f"{type(error).__name__} instead of OperatorError: {error}")
        else:
            self.check(name, False, "was accepted")

    def tensor(self) -> torch.Tensor:
        """``[statements]`` int64, 1 where one holds."""
        return torch.tensor([name not in self.wrong for name in self.names], dtype=torch.int64)


def _compare(got: torch.Tensor, wanted: torch.Tensor) -> tuple[bool, str]:
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False, f"{got.dtype} {list(got.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
    found, expected = bits_of(got), bits_of(wanted)
    different = np.argwhere(found != expected)
    if not len(different):
        return True, ""
    index = tuple(int(i) for i in different[0])
    share = f"{len(different)} of {found.size} elements differ"
    return False, f"{share}, first at {index}: bits {int(found[index]):#x} instead of {int(expected[index]):#x}"


class DeviceProblem(Problem, ABC):
    """One case of a question.

    Attributes:
        sabotaged: the drive does one thing wrong on purpose, so that some statement must come out false.
    """

    operands: Mapping[str, Operand] = MappingProxyType({})
    arithmetic = False

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.sabotaged = False
        self._facts = Facts()

    @property
    def spec(self) -> OperatorSpec:
        return OperatorSpec(
            name=self.case.operator, group="device", semantics="Drives storage.", arguments=(), returns="facts"
        )

    @abstractmethod
    def drive(self, bench: Bench, facts: Facts) -> None:
        """Do it, and state what must hold."""

    def prepare(self, bench: Bench) -> Prepared:
        def call() -> Outputs:
            facts = Facts()
            with bench.device.scope():
                self.drive(bench, facts)
            self._facts = facts
            return {FACTS: facts.tensor()}

        return Prepared(arguments={}, collect=as_given, call=call)

    def expected(self) -> Mapping[str, Expected | Exactly]:
        return {FACTS: Exactly(values=self._judge)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be tried on this device, after the drive."""
        return tuple(self._facts.notes)

    @property
    def stated(self) -> bool:
        """Whether the drive came to any statement."""
        return bool(self._facts.names)

    def _judge(self, _: npt.NDArray[np.generic]) -> str | None:
        wrong = self._facts.wrong
        if not self._facts.names and not self._facts.notes:
            return "nothing was stated"
        return None if not wrong else "; ".join(f"{name}: {found or 'no'}" for name, found in wrong.items())


def as_given(result: object, _: Mapping[str, torch.Tensor]) -> Outputs:
    """Outputs that the call itself returned by name, for :attr:`Prepared.collect`."""
    assert isinstance(result, Mapping)
    return result


class DeviceCheck(ProblemSet, ABC):
    """The cases of a question; ``operator`` is its name, ``levels`` need the answer."""

    levels: ClassVar[tuple[Level, ...]]


class DeviceQuestion(Check):
    """The check that judges the cases of one :class:`DeviceCheck`, under the same name."""

    def __init__(self, cases: DeviceCheck) -> None:
        self.name = cases.operator
        self.cases = cases

    def applies(self, case: Case, problem: Problem) -> bool:
        return case.operator == self.name

    def run(self, trial: Trial) -> Failure | None:
        observation = trial.ask()
        output = observation.outputs.get(FACTS)
        judge = trial.expected[FACTS]
        assert isinstance(judge, Exactly)
        assert callable(judge.values)
        reason = "nothing was returned" if output is None else judge.values(output.values)
        if reason is None:
            return None
        return Failure(check=self.name, cause=str(reason).partition(":")[0], message=str(reason), output=FACTS)

    def notes(self, trial: Trial) -> Sequence[str]:
        """What the device does not offer for this case."""
        assert isinstance(trial.problem, DeviceProblem)
        return trial.problem.notes

    def control(self, bench: Bench) -> Control:
        """The same drive with one thing done wrong on the same device."""
        problem = self.cases.problem(first_case(self.cases))
        assert isinstance(problem, DeviceProblem)
        problem.sabotaged = True
        trial = Trial(bench, problem)
        try:
            failed = self.run(trial) is not None
        finally:
            trial.close()
        if failed:
            return "failed as it must"
        # A device that has nothing of what is asked about can show neither a right nor a wrong answer.
        return "impossible here" if problem.notes and not problem.stated else "did not fail"


def first_case(cases: ProblemSet) -> Case:
    """The simplest: the first value of every axis."""
    axes: dict[str, Choice] = {name: values[0] for name, values in cases.axes().items()}
    mended = cases.mend(axes)
    assert mended is not None
    return Case.of(cases.operator, mended)
