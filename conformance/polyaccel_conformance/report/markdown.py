"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polyaccel_conformance.cli.blocks import failure_block
from polyaccel_conformance.multi.devices import described
from polyaccel_conformance.report.model import Report
from polyaccel_conformance.results import CheckState


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
    lines += [
        "## Operators",
        "",
        *table(
            ["operator", "cases", "failed", "runs as", "worst err/tol"],
            [
                [
                    f"`{state.operator}`",
                    str(state.cases),
                    str(state.failed),
                    ", ".join(f"{kind or 'not planned'} {count}" for kind, count in state.kinds.items()),
                    ", ".join(f"{name} {value:.2f}" for name, value in state.headroom.items()),
                ]
                for state in result.operators
                if state.cases
            ],
        ),
        "",
        "## Checks",
        "",
        *table(
            ["check", "verdict", "cases", "failures", "control"],
            [
                [
                    f"`{state.check}`",
                    state.verdict,
                    str(state.cases),
                    str(state.failures),
                    why(state),
                ]
                for state in result.checks
            ],
        ),
        "",
    ]
    if result.failures:
        lines += ["## Failures", ""]
        for group in result.failures:
            lines += ["```text", failure_block(group), "```", ""]
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


def why(state: CheckState) -> str:
    """What a check's verdict rests on."""
    return state.reason or state.control


def _list(title: str, items: Iterable[str]) -> list[str]:
    found = list(items)
    return [f"## {title}", "", *(f"- {item}" for item in found), ""] if found else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; bars and line ends inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines]
