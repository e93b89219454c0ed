"""A report for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from polyaccel_conformance.cli.blocks import failure_block
from polyaccel_conformance.levels.grant import LevelResult
from polyaccel_conformance.report.model import Report, runs_as, why
from polyaccel_conformance.results import RunResult

WIDE = 100
"""Characters of one reason; the other forms of a report give all of them in full."""
TITLE = 60
"""Characters of a level's title on one line: where it is restricted it names every cell."""


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
    promised = ["not promised"] if report.has_promises else []
    lines += table(
        ["operator", "verdict", "cases", "failed", *promised, "worst err/tol", "runs as"],
        [
            [
                state.operator,
                state.verdict,
                str(state.cases),
                str(state.failed),
                *([str(state.not_promised)] if promised else []),
                f"{max(state.headroom.values()):.2f}" if state.headroom else "",
                runs_as(state),
            ]
            for state in result.operators
            if state.cases
        ],
    )
    loud = [state for state in result.checks if state.verdict not in ("passed", "not exercised")]
    if loud:
        rows = [[state.check, state.verdict, why(state)] for state in loud]
        lines += ["", *table(["check", "verdict", "why"], rows)]
    for group in result.failures:
        lines += ["", failure_block(group)]
    if result.not_promised:
        lines += ["", "not promised: neither passed nor failed", *apart(result)]
    if report.not_exercised:
        lines += ["", "not exercised", *(line for item in report.not_exercised for line in _wrapped(item))]
    if report.applied.problems:
        lines += ["", "waivers", *(f"  {problem}" for problem in report.applied.problems)]
    if result.incomplete:
        lines += ["", f"partial: {result.incomplete}"]
    return "\n".join([*lines, "", report.verdict, ""])


def apart(result: RunResult) -> list[str]:
    """What failed and was never offered, by operator."""
    lines = []
    for group in result.not_promised:
        cases = f"{group.cases} case{'s' if group.cases != 1 else ''}"
        lines.append(f"  {group.operator}: {group.check}: {group.cause} ({cases})")
        lines += textwrap.wrap(group.failure.not_promised, WIDE, initial_indent="    ", subsequent_indent="    ")
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDE, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def levels(report: Report) -> list[str]:
    """The levels as a table."""
    rows = []
    for level in report.levels:
        first, *others = textwrap.wrap(level.title, TITLE, subsequent_indent="  ", break_on_hyphens=False)
        rows += [[first, level.verdict.value, _why(level)], *([line, "", ""] for line in others)]
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
