"""Reports: the same facts in every form, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.levels.grant import Verdict
from polyaccel_conformance.log import read_log
from polyaccel_conformance.report.markdown import markdown
from polyaccel_conformance.report.model import Report, grids
from polyaccel_conformance.report.page import page
from polyaccel_conformance.report.terminal import levels, terminal
from tests.conformance.certificate.small_run import failing, write_log


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of a run in which every case of one operator failed."""
    path = tmp_path_factory.mktemp("run") / "results.jsonl"
    write_log(path, change=failing)
    return recount(read_log(path))


class Page(HTMLParser):
    """What a page refers to, which elements it leaves open, and its text."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    return found


def test_the_page_is_whole_and_refers_to_nothing(report: Report) -> None:
    found = parsed(page(report))
    assert found.open == []
    assert found.references == []
    assert not re.search(r"@import|url\(|<script|<link", page(report))


def test_every_form_names_levels_operators_failures_and_what_was_not_exercised(report: Report) -> None:
    words = "".join(parsed(page(report)).words)
    for text in (terminal(report), markdown(report), words, json.dumps(report.to_json())):
        for wanted in ("L1 linear and copies", "not granted", "select_rows", "values.exact", "planted"):
            assert wanted in text
        assert "check device.wrong_current: " in text


def test_a_long_title_widens_no_other_row_of_the_terminals_table(report: Report) -> None:
    cells = ", ".join(f"sgmv rank {rank}" for rank in range(100))
    narrow = replace(report.levels[0], verdict=Verdict.RESTRICTED, restriction=cells)
    lines = levels(replace(report, levels=(narrow, *report.levels[1:])))
    assert "sgmv rank 99" in "\n".join(lines)
    assert max(map(len, lines)) < 200


def test_text_from_a_run_is_escaped(report: Report) -> None:
    result = replace(report.result, incomplete="<script>alert(1)</script>")
    text = page(replace(report, result=result))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_grid_counts_every_case_once_in_each_row_of_a_size(report: Report) -> None:
    found = grids(report.result.cells)["select_rows"]
    cases = next(state.cases for state in report.result.operators if state.operator == "select_rows")
    for axis in ("tokens", "hidden", "x"):
        squares = [s for row, columns in found.items() if row.split()[0] == axis for s in columns.values()]
        assert sum(square.cases for square in squares) == cases
        assert sum(square.failed for square in squares) == cases


def test_the_verdict_counts_failing_cases_and_names_what_was_earned(report: Report, tmp_path: Path) -> None:
    cases = next(state.failed for state in report.result.operators if state.operator == "select_rows")
    assert report.verdict == f"earned L0 device; {cases} failing cases"
    write_log(tmp_path / "log.jsonl", ended=False)
    assert recount(read_log(tmp_path / "log.jsonl")).verdict == "earned no level"
