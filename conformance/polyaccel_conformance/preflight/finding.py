"""What the preflight says: findings, the table of missing aten operators, and both as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from polyaccel.backend.levels import LEVELS


class Mark(Enum):
    """``FAIL`` is something a level cannot do without; ``ABSENT`` is a fact that limits what can be tested."""

    OK = "ok"
    FAIL = "FAIL"
    ABSENT = "no"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: ``section`` (``backend``, ``device 0``), what was looked at, and what was found."""

    section: str
    name: str
    mark: Mark
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorNeeds:
    """What one operator's composite executes, and what of it the device lacks.

    Attributes:
        operator: in the contract, or ``storage`` for weights, caches and steps.
        native: the backend has an implementation of its own, so that the composite may never run.
        needs: aten operators, sorted.
        missing: the ones that raise on the device, with the first line of what they raised.
        unknown: why nothing, or not everything, is known; empty if the composite ran and every call was made.
    """

    operator: str
    native: bool = False
    needs: tuple[str, ...] = ()
    missing: Mapping[str, str]
    unknown: str = ""

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels whose table names the operator; storage is needed from L1 on."""
        if self.operator == STORAGE:
            return ("L1",)
        return tuple(level.name for level in LEVELS.values() if self.operator in level.operators)


STORAGE = "storage"
LOADS = "loads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """Everything at once: nothing stops at the first failure."""

    subject: str
    findings: tuple[Finding, ...]
    table: tuple[OperatorNeeds, ...] = ()
    seconds: float = 0.0

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.mark is Mark.FAIL)

    @property
    def opened(self) -> bool:
        """Whether the backend was found and loaded."""
        return any(finding.name == LOADS and finding.mark is Mark.OK for finding in self.findings)

    @property
    def lacking(self) -> tuple[OperatorNeeds, ...]:
        """Operators that neither the backend nor the device's aten operators can run."""
        return tuple(row for row in self.table if row.missing and not row.native)

    @property
    def usable(self) -> bool:
        """Whether running cases makes sense at all."""
        return not self.failures

    @property
    def passed(self) -> bool:
        return self.usable and not self.lacking

    def to_json(self) -> dict[str, object]:
        return {
            "subject": self.subject,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "findings": [
                {"section": f.section, "name": f.name, "mark": f.mark.value, "detail": f.detail} for f in self.findings
            ],
            "operators": [
                {
                    "operator": row.operator,
                    "levels": list(row.levels),
                    "native": row.native,
                    "needs": list(row.needs),
                    "missing": dict(row.missing),
                    "unknown": row.unknown,
                }
                for row in self.table
            ],
        }

    def text(self) -> str:
        """For the terminal: findings by section, then one table of what is missing, by level."""
        lines = [f"preflight of {self.subject}"]
        width = max((len(f.name) for f in self.findings), default=0)
        section = ""
        for finding in self.findings:
            if finding.section != section:
                section = finding.section
                lines += ["", section]
            lines.append(f"  {finding.mark.value:<4}  {finding.name:<{width}}  {finding.detail}".rstrip())
        lines += ["", "aten operators that composites need and the device lacks", *_table(self.table)]
        verdict = "passed" if self.passed else f"{len(self.failures)} failures, {len(self.lacking)} operators lacking"
        return "\n".join([*lines, "", f"{verdict} in {self.seconds:.1f} s", ""])


def _table(rows: Sequence[OperatorNeeds]) -> list[str]:
    shown = [row for row in rows if row.missing]
    unknown = [row for row in rows if row.unknown]
    if not rows:
        return ["  not examined"]
    count = len({name for row in rows for name in row.needs})
    lines = [] if shown else [f"  none of {count}"]
    order = sorted(shown, key=lambda row: (row.levels or ("L9",), row.operator))
    if order:
        width = max(len(row.operator) for row in order)
        lines.append(f"  {'levels':<8} {'operator':<{width}}  {'runs as':<9}  missing")
        for row in order:
            how = "native" if row.native else "composite"
            for i, (name, why) in enumerate(sorted(row.missing.items())):
                head = (" ".join(row.levels) or "-", row.operator, how) if i == 0 else ("", "", "")
                lines.append(f"  {head[0]:<8} {head[1]:<{width}}  {head[2]:<9}  {name}: {why}")
    lines += [f"  note  {row.operator}: {row.unknown}" for row in unknown]
    return lines
