"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polyaccel_conformance.cli.blocks import failure_block
from polyaccel_conformance.multi.devices import described
from polyaccel_conformance.report.model import APART, HEADROOM, Report, is_idle, runs_as, why
from polyaccel_conformance.results import RunResult


def markdown(report: Report) -> str:
    """Without dates of its own: the same report always gives the same text."""
    result = report.result
    head = result.header
    lines = [f"# {report.title}", "", f"**{report.verdict}**", ""]
    lines += [
        f"Profile {head.profile}, seed {head.seed}, {result.cases} cases, contract {head.contract}, "
        f"suite revision {head.suite_revision}, started {head.started}.",
        "",
    ]
    if report.levels:
        rows = [[level.title, level.verdict.value, "; ".join(level.reasons)] for level in report.levels]
        lines += ["## Levels", "", *table(["level", "verdict", "why"], rows), ""]
    promised = ["not promised"] if report.has_promises else []
    lines += [
        "## Operators",
        "",
        *table(
            ["operator", "verdict", "cases", "failed", *promised, "runs as"],
            [
                [
                    f"`{state.operator}`",
                    state.verdict,
                    str(state.cases),
                    str(state.failed),
                    *([str(state.not_promised)] if promised else []),
                    runs_as(state),
                ]
                for state in result.operators
                if state.cases
            ],
        ),
        "",
        *_mappings(result),
        "## Headroom",
        "",
        HEADROOM,
        "",
        *headroom(result),
        "",
        "## Checks",
        "",
        *table(
            ["check", "verdict", "cases", "failures", "why"],
            [
                [f"`{state.check}`", state.verdict, str(state.cases), str(state.failures), why(state)]
                for state in result.checks
                if not is_idle(state)
            ],
        ),
        "",
    ]
    if result.failures:
        lines += ["## Failures", ""]
        for group in result.failures:
            lines += ["```text", failure_block(group), "```", ""]
    lines += _apart(result)
    lines += _list("Not exercised", report.not_exercised)
    waived = [f"`{w.test}` until {w.expires.isoformat()}: {w.reason} ({w.url})" for w in report.waivers]
    lines += _list("Waivers", (*waived, *report.applied.problems))
    lines += _list("Partial run", [result.incomplete] if result.incomplete else [])
    lines += _list("Ranks", map(described, report.identities))
    lines += [
        "## Environment",
        "",
        *table(["what", "value"], [[k, v] for k, v in sorted(head.environment.items())]),
        "",
    ]
    return "\n".join(lines)


def headroom(result: RunResult) -> list[str]:
    """Worst err / tol: a row for each output of each operator, a column for each dtype."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for state in result.operators:
        for name, worst in state.headroom.items():
            output, _, dtype = name.rpartition(" ")
            cells.setdefault((state.operator, output), {})[dtype] = worst
    dtypes = sorted({dtype for row in cells.values() for dtype in row}, key=lambda name: (name != "float32", name))
    return table(
        ["operator", "output", *dtypes],
        [
            [f"`{operator}`", output, *(f"{row[dtype]:.2f}" if dtype in row else "" for dtype in dtypes)]
            for (operator, output), row in cells.items()
        ],
    )


def _mappings(result: RunResult) -> list[str]:
    found = result.header.mappings
    if not found:
        return []
    rows = [[f"`{operator}`", mapping] for operator, mapping in sorted(found.items())]
    return ["## How operators are called", "", *table(["operator", "as"], rows), ""]


def _apart(result: RunResult) -> list[str]:
    """What failed and was never offered."""
    if not result.not_promised:
        return []
    return ["## Not promised", "", APART, "", *table(["operator", "what differs", "cases", "why"], apart(result)), ""]


def apart(result: RunResult) -> list[list[str]]:
    """Rows of what failed and was never offered: operator, check and cause, cases, reason."""
    return [
        [f"`{g.operator}`", f"`{g.check}`: {g.cause}", str(g.cases), g.failure.not_promised]
        for g in result.not_promised
    ]


def _list(title: str, items: Iterable[str]) -> list[str]:
    found = list(items)
    return [f"## {title}", "", *(f"- {item}" for item in found), ""] if found else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; bars and line ends inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines]
