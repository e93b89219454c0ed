"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from polyaccel_conformance.cli.blocks import failure_block
from polyaccel_conformance.multi.devices import described
from polyaccel_conformance.report.model import (
    APART,
    HEADROOM,
    Grid,
    Report,
    Square,
    dtypes,
    grids,
    is_idle,
    runs_as,
    why,
)
from polyaccel_conformance.results import RunResult

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #ffffff; --line: #d5dbe3; --soft: #f3f5f8; --good: #1f7a4d;
  --mid: #9a6700; --bad: #b3261e; --good-soft: #dff3e7; --mid-soft: #fdf0cf; --bad-soft: #fbdedb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --line: #39414c; --soft: #1e242c;
  --good: #6fd29f; --mid: #e3b95a; --bad: #f2938c; --good-soft: #173527; --mid-soft: #3a2f12; --bad-soft: #45201d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .35rem; font-family: ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; vertical-align: top;
  border-bottom: 1px solid var(--line); } th { font-weight: 600; background: var(--soft); }
table:not(.grid) td:first-child { min-width: 15rem; } td span.good, td span.mid, td span.bad { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.verdict { font-size: 1.05rem; font-weight: 600; margin: 0 0 .5rem; }
.facts { color: color-mix(in srgb, var(--ink) 70%, transparent); }
.good { color: var(--good); } .mid { color: var(--mid); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1.25rem; }
.grid td, .grid th { padding: .1rem .4rem; font-size: .82rem; white-space: nowrap; }
.grid { font-variant-numeric: tabular-nums; }
.native { background: var(--good-soft); } .composite, .mixed { background: var(--mid-soft); }
.failed { background: var(--bad-soft); font-weight: 700; }
.apart { background: var(--soft); } .empty { color: var(--line); }
.bar { position: relative; height: .9rem; min-width: 8rem; background: var(--soft); border: 1px solid var(--line); }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--good); } .bar i.over { background: var(--bad); }
@media (max-width: 48rem) { table:not(.grid) { min-width: 48rem; } table:not(.grid) td:first-child { min-width: 0; } }
pre { background: var(--soft); border: 1px solid var(--line); padding: .75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .82rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; } ul { padding-left: 1.2rem; }
"""
TONES = {"granted": "good", "passed": "good", "restricted": "mid", "not granted": "bad", "failed": "bad"}
SIGNS = {"native": "", "composite": "c", "mixed": "m", "failed": "&#10007;", "apart": "~", "empty": ""}


def page(report: Report) -> str:
    """The page. Every text in it is escaped; it refers to no other file, font or script."""
    body = "\n".join(part for part in _parts(report) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _parts(report: Report) -> Iterator[str]:
    result, head = report.result, report.result.header
    yield f"<h1>{escape(report.title)}</h1>"
    yield f'<p class="verdict {_tone(result)}">{escape(report.verdict)}</p>'
    yield (
        f'<p class="facts">Profile {escape(head.profile)}, seed {head.seed}, {result.cases} cases in '
        f"{result.seconds:.0f} s, contract {escape(head.contract)}, started {escape(head.started)}.</p>"
    )
    if result.incomplete:
        yield f'<p class="mid">Partial run: {escape(result.incomplete)}</p>'
    if report.levels:
        yield "<h2>Levels</h2>" + _table(
            ["level", "verdict", "why"],
            [
                [escape(level.title), _toned(level.verdict.value), escape("; ".join(level.reasons))]
                for level in report.levels
            ],
        )
    if result.failures:
        yield "<h2>Failures</h2>" + "".join(f"<pre>{escape(failure_block(group))}</pre>" for group in result.failures)
    yield _operators(report)
    yield _apart(report)
    yield _coverage(report)
    yield _headroom(report)
    yield _checks(report)
    yield _bullets("Not exercised", report.not_exercised)
    yield _bullets("Ranks", tuple(map(described, report.identities)))
    waived = [f"{w.test} until {w.expires.isoformat()}: {w.reason} ({w.url})" for w in report.waivers]
    yield _bullets("Waivers", (*waived, *report.applied.problems))
    rows = [[escape(name), f"<code>{escape(value)}</code>"] for name, value in sorted(head.environment.items())]
    yield "<h2>Environment</h2>" + _table(["what", "value"], rows)


def _tone(result: RunResult) -> str:
    if result.failures or result.device_lost:
        return "bad"
    return "mid" if result.incomplete or result.not_promised else "good"


def _operators(report: Report) -> str:
    mappings = report.result.header.mappings
    rows = [
        [
            f"<code>{escape(state.operator)}</code>",
            _toned(state.verdict),
            str(state.cases),
            str(state.failed),
            *([str(state.not_promised)] if report.has_promises else []),
            escape(runs_as(state)),
            *([escape(mappings.get(state.operator, ""))] if mappings else []),
        ]
        for state in report.result.operators
        if state.cases
    ]
    apart = ["not promised"] if report.has_promises else []
    head = ["operator", "verdict", "cases", "failed", *apart, "runs as", *(["called as"] if mappings else [])]
    return "<h2>Operators</h2>" + _table(head, rows, numbers={2, 3, 4} if apart else {2, 3}) if rows else ""


def _apart(report: Report) -> str:
    rows = [
        [
            f"<code>{escape(group.operator)}</code>",
            f"<code>{escape(group.check)}</code>: {escape(group.cause)}",
            str(group.cases),
            escape(group.failure.not_promised),
        ]
        for group in report.result.not_promised
    ]
    table = _table(["operator", "what differs", "cases", "why"], rows, numbers={2})
    return f'<h2>Not promised</h2><p class="facts">{APART}</p>{table}' if rows else ""


def _coverage(report: Report) -> str:
    blocks = "".join(
        f"<section><h3>{escape(operator)}</h3>{_grid(grid)}</section>"
        for operator, grid in grids(report.result.cells).items()
    )
    apart = ', <span class="apart">3/12 ~</span> not promised' if report.has_promises else ""
    legend = (
        '<p class="facts">Cases by range of a size and by layout of an argument. '
        '<span class="native">12</span> native, <span class="composite">12 c</span> composite, '
        '<span class="mixed">12 m</span> both, <span class="failed">3/12 &#10007;</span> failed'
        f"{apart}.</p>"
    )
    return f'<h2>Coverage</h2>{legend}<div class="grids">{blocks}</div>' if blocks else ""


def _grid(grid: Grid) -> str:
    columns = dtypes(grid)
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in columns)
    rows = "".join(
        f"<tr><th>{escape(row)}</th>{''.join(_square(squares.get(name, Square())) for name in columns)}</tr>"
        for row, squares in grid.items()
    )
    return f'<div class="scroll"><table class="grid"><tr><th></th>{head}</tr>{rows}</table></div>'


def _square(square: Square) -> str:
    bad = square.failed or square.not_promised
    count = f"{bad}/{square.cases}" if bad else str(square.cases or "-")
    sign = SIGNS[square.state]
    title = f"worst err/tol {square.headroom:.3f}"
    return f'<td class="n {square.state}" title="{title}">{count}{" " + sign if sign else ""}</td>'


def _headroom(report: Report) -> str:
    rows = []
    for state in report.result.operators:
        for name, worst in state.headroom.items():
            share = min(max(worst, 0.0), 1.0) * 100
            over = ' class="over"' if worst > 1 else ""
            bar = f'<div class="bar"><i{over} style="width:{share:.1f}%"></i></div>'
            rows.append([f"<code>{escape(state.operator)}</code>", escape(name), f"{worst:.3f}", bar])
    if not rows:
        return ""
    table = _table(["operator", "output", "err/tol", ""], rows, numbers={2})
    return f'<h2>Headroom</h2><p class="facts">{HEADROOM}</p>{table}'


def _checks(report: Report) -> str:
    rows = [
        [
            f"<code>{escape(state.check)}</code>",
            _toned(state.verdict),
            str(state.cases),
            str(state.failures),
            escape(why(state)),
        ]
        for state in report.result.checks
        if not is_idle(state)
    ]
    return "<h2>Checks</h2>" + _table(["check", "verdict", "cases", "failures", "why"], rows, numbers={2, 3})


def _toned(verdict: str) -> str:
    return f'<span class="{TONES.get(verdict, "mid")}">{escape(verdict)}</span>'


def _bullets(title: str, items: Iterable[str]) -> str:
    found = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<h2>{escape(title)}</h2><ul>{found}</ul>" if found else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int] | None = None) -> str:
    """Cells are HTML already."""
    right = numbers or set()

    def row(cells: Sequence[str], tag: str) -> str:
        marks = ((' class="n"' if i in right else "") for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{m}>{cell}</{tag}>" for m, cell in zip(marks, cells, strict=True)) + "</tr>"

    lines = [row(head, "th"), *(row(cells, "td") for cells in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
