"""Several runs side by side, one for each setting of a library: which operators each setting gets right, and how close.

The page of the documentation about measured numerics is written by this, from the runs' logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polyaccel_conformance.report.markdown import apart, headroom, table
from polyaccel_conformance.report.model import Report, runs_as
from polyaccel_conformance.results import OperatorState

NUMERIC = ("values.exact", "values.bound", "numerics.measured")
"""Checks of the three tiers."""
FACTS = ("hardware", "torch", "kernels")

HEAD = """# {title}

Written by `polyaccel conformance numerics`; not to be edited. Each setting is one run. *Worst err / tol* is the
worst error of random data as a share of what the oracle allows: up to 1 is right. Checks that failed are named with
the number of cases: those of the three tiers, which judge the numbers, apart from all others.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run: ``name`` as the page calls it, and its report."""

    name: str
    report: Report


def numerics(title: str, settings: Sequence[Setting]) -> str:
    """The page."""
    return "\n".join(_lines(title, settings))


def _lines(title: str, settings: Sequence[Setting]) -> Iterator[str]:
    yield HEAD.format(title=title)
    head = ["setting", "profile", "cases", "verdict", "named by the tiers", "operators whose numbers are wrong"]
    yield from table(head, [_summary(setting) for setting in settings])
    yield ""
    for setting in settings:
        yield f"## {setting.name}"
        yield ""
        yield f"`{setting.report.subject}`, started {setting.report.result.header.started}. {_environment(setting)}"
        yield ""
        rows = [_row(setting.report, state) for state in setting.report.result.operators if state.cases]
        yield from table(["operator", "verdict", "cases", "runs as", "worst err / tol", "tiers", "other checks"], rows)
        yield ""
        rows = apart(setting.report.result)
        if rows:
            yield "Never promised, so neither passed nor failed:"
            yield ""
            yield from table(["operator", "what differs", "cases", "why"], rows)
            yield ""
    yield "## Headroom"
    yield ""
    yield "By output and dtype."
    yield ""
    for setting in settings:
        lines = headroom(setting.report.result)
        if len(lines) > 2:
            yield f"### {setting.name}"
            yield ""
            yield from lines
            yield ""


def _summary(setting: Setting) -> list[str]:
    header = setting.report.result.header
    name = f"[{setting.name}](#{_anchor(setting.name)})"
    wrong = [group for group in setting.report.result.failures if group.check in NUMERIC]
    checks = [f"`{check}`" for check in NUMERIC if any(group.check == check for group in wrong)]
    operators = dict.fromkeys(f"`{group.operator}`" for group in wrong)
    return [
        name,
        f"{header.profile}, seed {header.seed}",
        str(setting.report.result.cases),
        setting.report.verdict,
        ", ".join(checks) or "none",
        ", ".join(operators) or "none",
    ]


def _anchor(name: str) -> str:
    kept = "".join(c for c in name.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _environment(setting: Setting) -> str:
    environment = setting.report.result.header.environment
    found = [f"{name} {environment[name]}" for name in FACTS if environment.get(name)]
    return "; ".join(found) + "." if found else ""


def _row(report: Report, state: OperatorState) -> list[str]:
    worst = max(state.headroom.values(), default=0.0)
    verdict = state.verdict if not state.failed else f"**{state.verdict}** {state.failed}"
    tiers, others = _named(report, state.operator)
    shown = f"{worst:.2f}" if state.headroom else ""
    return [f"`{state.operator}`", verdict, str(state.cases), runs_as(state), shown, tiers, others]


def _named(report: Report, operator: str) -> tuple[str, str]:
    """The checks that failed: of the three tiers, and all others."""
    found: dict[str, int] = {}
    for group in report.result.failures:
        if group.operator == operator:
            found[group.check] = found.get(group.check, 0) + group.cases
    tiers = [f"`{name}` {found[name]}" for name in NUMERIC if name in found]
    others = [f"`{name}` {count}" for name, count in sorted(found.items()) if name not in NUMERIC]
    return ", ".join(tiers), ", ".join(others)
