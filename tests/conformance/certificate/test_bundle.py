"""Bundles: which runs make a certificate, which a report, and that nothing in them depends on chance."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from polyaccel_conformance.certificate.bundle import SUMMARY, exit_code, read_bundle, write_bundle
from polyaccel_conformance.certificate.diff import diff_summaries
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.log import read_log
from polyaccel_conformance.report.support import support
from polyaccel_conformance.waivers import Waiver
from tests.conformance.certificate.small_run import failing, write_log


def waiver(test: str, expires: str = "2026-12-31") -> Waiver:
    return Waiver(
        test=test,
        reason="known",
        url="https://github.com/acme/issues/1",
        expires=datetime.date.fromisoformat(expires),
    )


def kind(log: Path, *waivers: Waiver) -> str:
    return write_bundle(log.with_suffix(".tar.xz"), log, waivers)


def test_the_same_log_gives_the_same_bytes(log: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_bundle(tmp_path / name, log)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_whole_run_that_earned_a_level_is_a_certificate(certificate: Path) -> None:
    summary = read_bundle(certificate).json(SUMMARY)
    assert summary["kind"] == "certificate"
    assert [level["level"] for level in summary["levels"] if level["verdict"] == "granted"] == ["L0"]


def test_a_run_that_was_broken_off_is_a_report_and_earns_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", ended=False)
    assert kind(tmp_path / "log.jsonl") == "report"
    report = recount(read_log(tmp_path / "log.jsonl"))
    assert not any(level.earned for level in report.levels)
    assert exit_code(report) is ExitCode.INCONCLUSIVE


def test_a_run_of_selected_cases_is_a_report(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", selection="-k float32")
    assert kind(tmp_path / "log.jsonl") == "report"


def test_a_run_with_failures_is_a_report_unless_waivers_cover_every_one(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    write_log(log, change=failing)
    assert kind(log) == "report"
    assert kind(log, waiver("select_rows/values.exact/*")) == "certificate"
    assert kind(log, waiver("select_rows/values.exact/dtype=float32")) == "report"


@pytest.mark.parametrize(
    "bad",
    [waiver("select_rows/values.exact/*", "2026-05-31"), waiver("linear/values.exact/*")],
    ids=["expired", "matches nothing"],
)
def test_a_waiver_that_expired_or_matches_nothing_fails_the_run(tmp_path: Path, bad: Waiver) -> None:
    log = tmp_path / "log.jsonl"
    write_log(log, change=failing)
    good = waiver("select_rows/values.exact/*")
    assert kind(log, good, bad) == "report"
    assert exit_code(recount(read_log(log), [good])) in (ExitCode.PASS, ExitCode.FAIL)
    assert exit_code(recount(read_log(log), [good, bad])) is ExitCode.FAIL


def differences(before: Path, after: Path) -> str:
    return diff_summaries(read_bundle(before).json(SUMMARY), read_bundle(after).json(SUMMARY))


def test_two_equal_bundles_do_not_differ(certificate: Path) -> None:
    assert "no difference" in differences(certificate, certificate)


def test_a_difference_names_what_changed_and_how(certificate: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", change=failing, sources={"torch": "9.9"})
    kind(tmp_path / "log.jsonl")
    text = differences(certificate, tmp_path / "log.tar.xz")
    assert "select_rows: failed 0 -> " in text
    assert "values.exact: passed -> failed" in text
    assert "-> 9.9" in text


def test_the_support_page_has_a_row_a_certificate_and_refuses_reports(certificate: Path, tmp_path: Path) -> None:
    page = support([read_bundle(certificate)])
    (row,) = [line for line in page.splitlines() if line.startswith("| `cpu`")]
    assert row.count("yes") == 1
    assert "There is no certificate yet." in support([])
    write_log(tmp_path / "log.jsonl", ended=False)
    kind(tmp_path / "log.jsonl")
    with pytest.raises(UsageError, match="no certificate"):
        support([read_bundle(tmp_path / "log.tar.xz")])
