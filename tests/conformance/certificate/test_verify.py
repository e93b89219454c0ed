"""Verifying: a bundle as it was written is valid; whatever is done to it by hand is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from polyaccel.backend import Backend, Device
from polyaccel_conformance.certificate.bundle import LOG, MANIFEST, PAGE, SUMMARY, manifest, read_bundle, write_bundle
from polyaccel_conformance.certificate.verify import Verification, verify
from polyaccel_conformance.errors import ExitCode, UsageError
from tests.conformance.certificate.small_run import edit_json, edit_lines, failing, rewritten, write_log

Files = dict[str, bytes]


def verified(path: Path, **options: Any) -> Verification:
    return verify(read_bundle(path), **options)


def edited(certificate: Path, folder: Path, change: Callable[[Files], None], *, clever: bool) -> Verification:
    """Verify the bundle after an edit; a ``clever`` hand also repairs the hashes and the page."""

    def apply(files: Files) -> None:
        change(files)
        if clever:
            files[MANIFEST] = manifest({name: data for name, data in files.items() if name != MANIFEST})

    return verified(rewritten(certificate, folder / "edited.tar.xz", apply))


def test_a_bundle_as_it_was_written_is_valid(certificate: Path) -> None:
    found = verified(certificate)
    assert (found.verdict, found.problems, found.stale) == ("VALID", (), ())
    assert found.kind == "certificate"
    assert found.regenerated == found.cases > 150
    assert found.exit_code is ExitCode.PASS


def test_a_certificate_is_verified_where_its_devices_are_not(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(backend: Backend) -> Sequence[Device]:
        raise ModuleNotFoundError("No module named 'torch_of_a_vendor'")

    monkeypatch.setattr("polyaccel.backend.cpu.backend.CpuBackend.devices", absent)
    assert verified(certificate).verdict == "VALID"


def test_executing_cases_again_gives_the_same_verdicts(certificate: Path) -> None:
    found = verified(certificate, rerun=20)
    assert (found.verdict, found.rerun) == ("VALID", 20)


@pytest.mark.parametrize("name", [LOG, SUMMARY, PAGE])
def test_a_file_edited_by_hand_is_named(certificate: Path, tmp_path: Path, name: str) -> None:
    def change(files: Files) -> None:
        files[name] = files[name].replace(b"select_rows", b"select_rowz", 1)

    found = edited(certificate, tmp_path, change, clever=False)
    assert found.exit_code is ExitCode.FAIL
    assert f"{name} does not match its hash: it was edited by hand" in found.problems


def grant_everything(files: Files) -> None:
    def change(summary: Any) -> None:
        for level in summary["levels"]:
            level["verdict"] = "granted"

    edit_json(files, SUMMARY, change)


def better_headroom(files: Files) -> None:
    def change(summary: Any) -> None:
        summary["result"]["operators"][0]["cases"] += 1000

    edit_json(files, SUMMARY, change)


def drop_cases(files: Files) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any] | None:
        return None if line["type"] == "case" and line["case"]["axes"].get("structure.rows") == "none" else line

    edit_lines(files, LOG, change)


def other_inputs(files: Files) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        if line["type"] == "case" and line["digests"]:
            line["digests"] = dict.fromkeys(line["digests"], "0" * 32)
        return line

    edit_lines(files, LOG, change)


def simpler_cases(files: Files) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        if line["type"] == "case":
            line["case"]["axes"]["dims.tokens"] = 1
        return line

    edit_lines(files, LOG, change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (grant_everything, 'levels[1].verdict says "granted", the log gives "not granted"'),
        (better_headroom, "the summary: device.copy_paths says"),
        (drop_cases, "is not in the log"),
        (other_inputs, "has other inputs than those on record"),
        (simpler_cases, "the log gives"),
    ],
)
def test_an_edit_that_repairs_every_hash_is_found_all_the_same(
    certificate: Path, tmp_path: Path, change: Callable[[Files], None], says: str
) -> None:
    found = edited(certificate, tmp_path, change, clever=True)
    assert found.verdict == "INVALID"
    assert not any("does not match its hash" in problem for problem in found.problems)
    assert any(says in problem for problem in found.problems), found.problems


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("source.backend", "the backend's source has changed"),
        ("source.contract", "the contract has changed"),
        ("source.core", "the core that backends run on has changed"),
        ("source.suite", "the suite has changed"),
    ],
)
def test_a_bundle_of_other_sources_is_stale_and_says_which(tmp_path: Path, key: str, says: str) -> None:
    write_log(tmp_path / "results.jsonl", sources={key: "0" * 32})
    write_bundle(tmp_path / "old.tar.xz", tmp_path / "results.jsonl")
    found = verified(tmp_path / "old.tar.xz")
    assert (found.verdict, found.problems) == ("STALE", ())
    assert says in found.stale
    assert found.exit_code is ExitCode.INCONCLUSIVE


def test_a_backend_that_is_not_installed_here_cannot_be_compared(certificate: Path, tmp_path: Path) -> None:
    def change(files: Files) -> None:
        def rename(line: dict[str, Any]) -> dict[str, Any]:
            if line["type"] == "run":
                line["subject"]["name"] = "elsewhere"
            return line

        edit_lines(files, LOG, rename)

    found = edited(certificate, tmp_path, change, clever=True)
    assert any("cannot be compared" in reason for reason in found.stale)


def test_a_rerun_that_disagrees_with_the_log_is_a_problem(tmp_path: Path) -> None:
    write_log(tmp_path / "results.jsonl", change=failing)
    write_bundle(tmp_path / "b.tar.xz", tmp_path / "results.jsonl")
    found = verified(tmp_path / "b.tar.xz", rerun=6)
    assert any("passed, it failed before" in problem for problem in found.problems)


def test_a_suite_that_judges_otherwise_makes_a_bundle_stale_and_not_invalid(tmp_path: Path) -> None:
    write_log(tmp_path / "results.jsonl", sources={"source.suite": "0" * 32})
    write_bundle(tmp_path / "old.tar.xz", tmp_path / "results.jsonl")
    reworded = edited(
        tmp_path / "old.tar.xz",
        tmp_path,
        lambda files: edit_json(files, SUMMARY, lambda summary: summary.pop("waiver_problems")),
        clever=True,
    )
    assert (reworded.verdict, reworded.problems) == ("STALE", ())
    assert any("1 differences" in note for note in reworded.notes)


def test_counts_that_the_log_does_not_give_are_invalid_however_old_the_bundle(tmp_path: Path) -> None:
    write_log(tmp_path / "results.jsonl", sources={"source.suite": "0" * 32})
    write_bundle(tmp_path / "old.tar.xz", tmp_path / "results.jsonl")
    found = edited(tmp_path / "old.tar.xz", tmp_path, better_headroom, clever=True)
    assert found.verdict == "INVALID"


def test_drawn_cases_that_were_left_out_are_missed(certificate: Path, tmp_path: Path) -> None:
    def drop(files: Files) -> None:
        def change(line: dict[str, Any]) -> dict[str, Any] | None:
            return None if line["type"] == "case" and line["phase"] == "drawn" else line

        edit_lines(files, LOG, change)

    found = edited(certificate, tmp_path, drop, clever=True)
    assert any("drawn case" in problem and "is not in the log" in problem for problem in found.problems)


def test_a_log_that_no_run_writes_is_a_problem_and_no_traceback(certificate: Path, tmp_path: Path) -> None:
    def change(files: Files) -> None:
        def bend(line: dict[str, Any]) -> dict[str, Any]:
            if line["type"] == "case":
                line["digests"] = {"x": 7}
            return line

        edit_lines(files, LOG, bend)

    assert edited(certificate, tmp_path, change, clever=True).verdict == "INVALID"


@pytest.mark.parametrize("content", [b"", b"not an archive", json.dumps({}).encode()])
def test_what_is_no_bundle_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar.xz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="bundle"):
        read_bundle(path)


def test_a_bundle_that_lacks_a_file_is_a_usage_error(certificate: Path, tmp_path: Path) -> None:
    path = rewritten(certificate, tmp_path / "x.tar.xz", lambda files: files.pop(LOG) and None)
    with pytest.raises(UsageError, match=LOG):
        read_bundle(path)


def test_a_path_in_the_archive_is_never_followed(certificate: Path, tmp_path: Path) -> None:
    def add(files: Files) -> None:
        files["../outside"] = b"x"

    with pytest.raises(UsageError, match="which no bundle does"):
        read_bundle(rewritten(certificate, tmp_path / "x.tar.xz", add))
