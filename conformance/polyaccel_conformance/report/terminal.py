"""A report for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel_conformance.report.blocks import failure_block
from polyaccel_conformance.report.model import Report


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
        lines += table(
            ["level", "verdict", "why"],
            [[level.title, level.verdict.value, "; ".join(level.reasons)] for level in report.levels],
        )
        lines.append("")
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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns; the last one may be as long as it likes."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in (head, *rows)
    ]
