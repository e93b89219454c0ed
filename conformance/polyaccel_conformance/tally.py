"""Counting: what a run's cases add up to, by check, by operator and by cell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyaccel_conformance.cells import count_cells
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.results import CellCount, CheckState, OperatorState, RunHeader, Verdict

SLOW_SECONDS = 0.010
AS_IT_MUST = "failed as it must"
IMPOSSIBLE = "impossible here"
NO_CASE = "no case asks it"


@dataclass(slots=True)
class Tally:
    """Everything that has been counted so far."""

    results: list[CaseResult] = field(default_factory=list)
    controls: dict[str, str] = field(default_factory=dict)
    planned: Counter[str] = field(default_factory=Counter)
    failed: int = 0

    def plan(self, operator: str) -> None:
        self.planned[operator] += 1

    def add(self, result: CaseResult) -> None:
        self.results.append(result)
        self.failed += result.wrong

    @property
    def cases(self) -> int:
        return len(self.results)

    @property
    def planned_cases(self) -> int:
        return self.planned.total()

    def asked(self, *, several: bool) -> set[str]:
        """Checks that some case of one rank, or of ``several``, asked."""
        return {name for result in self.results if (result.case.ranks > 1) is several for name in result.checks}

    def check_states(self, checks: Sequence[str]) -> tuple[CheckState, ...]:
        """The verdict on each check, and on what failed under a name that is no check's."""
        asked: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        excused: Counter[str] = Counter()
        for result in self.results:
            asked.update(result.checks)
            wrong = {failure.check for failure in result.failures if not failure.not_promised}
            failures.update(wrong)
            excused.update({failure.check for failure in result.failures} - wrong)
        others = [name for name in sorted(failures | excused) if name not in checks]
        return tuple(self._state(name, asked[name], failures[name], excused[name]) for name in [*checks, *others])

    def _state(self, name: str, cases: int, failures: int, excused: int) -> CheckState:
        control = self.controls.get(name, "")
        verdict: Verdict = "passed"
        reason = ""
        if failures:
            verdict = "failed"
        elif control.startswith(IMPOSSIBLE):
            verdict = "not exercised"
            reason = control.removeprefix(IMPOSSIBLE).removeprefix(": ") or "its control is impossible here"
        elif not cases:
            verdict, reason = "not exercised", NO_CASE
        elif control != AS_IT_MUST:
            verdict = "inconclusive"
            reason = f"its control {control}" if control else "its control was not run"
        elif excused:
            verdict, reason = "not promised", f"{excused} cases differ in what was never promised"
        return CheckState(
            check=name,
            verdict=verdict,
            cases=cases,
            failures=failures,
            not_promised=excused,
            control=control,
            reason=reason,
        )

    def operator_states(self, header: RunHeader) -> tuple[OperatorState, ...]:
        """One for each operator in scope, and for those out of it."""
        by_operator: dict[str, list[CaseResult]] = {name: [] for name in header.operators}
        for result in self.results:
            by_operator.setdefault(result.case.operator, []).append(result)
        found = [self._operator(name, results) for name, results in by_operator.items()]
        return (*found, *(OperatorState(operator=name, reason="not in the table") for name in header.out_of_scope))

    def _operator(self, name: str, results: Sequence[CaseResult]) -> OperatorState:
        headroom: dict[str, float] = {}
        for result in results:
            for output, worst in result.headroom.items():
                key = f"{output} {result.case.dtype}"
                headroom[key] = max(headroom.get(key, 0.0), worst)
        return OperatorState(
            operator=name,
            cases=len(results),
            failed=sum(result.wrong for result in results),
            not_promised=sum(result.excused for result in results),
            planned=self.planned[name],
            kinds=_counted(result.kind for result in results),
            implementations=_counted(result.implementation for result in results),
            headroom=dict(sorted(headroom.items())),
            # Python 3.12 sums more exactly than 3.11 does; a certificate is verified by either.
            seconds=math.fsum(result.seconds for result in results),
            slow=sum((result.cpu or result.seconds) > SLOW_SECONDS for result in results),
            reason="" if results else "no case was run",
        )

    def cells(self) -> tuple[CellCount, ...]:
        return count_cells(self.results)

    def empty_cells(self, header: RunHeader, checks: Sequence[CheckState], facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Required cells of the levels in which nothing ran although the hardware is there."""
        from polyaccel_conformance.levels.evidence import Machine, empty_cells, gather

        machine = Machine(devices=facts["devices"], ranks=header.devices, graphs=facts["graphs"])
        return empty_cells(gather(self.results, checks, machine), header.operators)


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
