"""A report for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel_conformance.cli.blocks import failure_block
from polyaccel_conformance.levels.grant import LevelResult
from polyaccel_conformance.report.model import Report

WIDE = 100
"""Characters of one reason; the other forms of a report give all of them in full."""


def terminal(report: Report) -> str:
    """Levels, operators, checks that say anything but passed, failures, and what was not exercised."""
    result = report.result
    head = result.header
    lines = [
        report.title,
        f"profile {head.profile}, seed {head.seed}, {result.cases} cases in {result.seconds:.0f} s",
        "",
    ]
    if report.levels:
        lines += [*levels(report), ""]
    lines += table(
        ["operator", "cases", "failed", "runs as", "worst err/tol"],
        [
            [
                state.operator,
                str(state.cases),
                str(state.failed),
                ", ".join(f"{kind or 'not planned'} {count}" for kind, count in state.kinds.items()),
                f"{max(state.headroom.values()):.2f}" if state.headroom else "",
            ]
            for state in result.operators
            if state.cases
        ],
    )
    quiet = [state for state in result.checks if state.verdict != "passed"]
    if quiet:
        rows = [[state.check, state.verdict, state.reason or state.control] for state in quiet]
        lines += ["", *table(["check", "verdict", "why"], rows)]
    for group in result.failures:
        lines += ["", failure_block(group)]
    if report.not_exercised:
        lines += ["", "not exercised", *(f"  {line}" for line in report.not_exercised)]
    if report.applied.problems:
        lines += ["", "waivers", *(f"  {problem}" for problem in report.applied.problems)]
    if result.incomplete:
        lines += ["", f"partial: {result.incomplete}"]
    return "\n".join([*lines, "", report.verdict, ""])


def levels(report: Report) -> list[str]:
    """The levels as a table."""
    rows = [[level.title, level.verdict.value, _why(level)] for level in report.levels]
    return table(["level", "verdict", "why"], rows)


def _why(level: LevelResult) -> str:
    first = level.reasons[0] if level.reasons else ""
    more = f" (and {len(level.reasons) - 1} more reasons)" if len(level.reasons) > 1 else ""
    return f"{first if len(first) <= WIDE else first[: WIDE - 3] + '...'}{more}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns; the last one may be as long as it likes."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in (head, *rows)
    ]
