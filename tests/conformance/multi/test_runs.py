"""Whole runs on several ranks: who they were is recorded, and a hang is a case like any other."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from polyaccel_conformance.casefile import CaseFile, Outcome
from polyaccel_conformance.certificate.bundle import read_bundle, write_bundle
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.certificate.verify import verify
from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.log import read_log
from polyaccel_conformance.multi.devices import described
from polyaccel_conformance.profiles import PROFILES
from polyaccel_conformance.ranked import MAX_HANGS
from polyaccel_conformance.replay import replay
from polyaccel_conformance.report.markdown import markdown
from polyaccel_conformance.runner import RESULTS, Options, run
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer
from tests.conformance.multi.subjects import subject

OPTIONS = Options(
    profile="quick",
    operators=("barrier",),
    checks=("comm.collectives", "comm.trace"),
    devices=3,
    shrink=False,
    controls=False,
)


def test_the_report_says_who_every_rank_of_every_world_was(tmp_path: Path, server: ForkServer) -> None:
    run(Subject(), replace(OPTIONS, folder=tmp_path), server=server)
    logged = read_log(tmp_path / RESULTS)
    assert [(each.world_size, each.rank) for each in logged.identities] == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    pids = {each.pid for each in logged.identities}
    assert len(pids | {os.getpid()}) == 6
    assert {each.transport for each in logged.identities} == {"gloo"}
    assert {each.device_id for each in logged.identities} == {"cpu"}
    assert all(each.version.startswith("polyaccel ") for each in logged.identities)
    report = recount(logged)
    (level,) = [level for level in report.levels if level.level.name == "L6"]
    assert level.name == "L6 several devices (3 ranks sharing 1 device: cpu; float32, bfloat16)"
    assert report.to_json()["ranks"][4]["rank"] == 2
    assert described(logged.identities[4]) in markdown(report)


def test_the_inputs_of_every_rank_are_drawn_again_when_a_certificate_is_verified(
    tmp_path: Path, server: ForkServer
) -> None:
    run(Subject(), replace(OPTIONS, operators=("broadcast",), devices=2, folder=tmp_path), server=server)
    bundle = tmp_path / "report.tar.xz"
    write_bundle(bundle, tmp_path / RESULTS)
    found = verify(read_bundle(bundle))
    assert found.regenerated == found.cases > 0
    assert not [line for line in (*found.problems, *found.notes) if "inputs" in line]
    files = dict(read_bundle(bundle).files)
    files["log.jsonl"] = files["log.jsonl"].replace(b'"inputs":"', b'"inputs":"f', 1)
    edited = verify(replace(read_bundle(bundle), files=files))
    assert [line for line in (*edited.problems, *edited.notes) if "inputs" in line]


def test_simulated_devices_are_named_by_the_level(tmp_path: Path, server: ForkServer) -> None:
    run(Subject(name="simulated"), replace(OPTIONS, devices=2, folder=tmp_path), server=server)
    report = recount(read_log(tmp_path / RESULTS))
    names = {level.level.name: level.name for level in report.levels}
    assert names["L6"] == "L6 several devices (2 simulated devices; float32, bfloat16)"
    assert names["L1"] == "L1 linear and copies (simulated device; float32, bfloat16)"


def test_a_hang_becomes_a_saved_case_that_replays(tmp_path: Path, server: ForkServer) -> None:
    options = replace(OPTIONS, operators=("all_reduce",), checks=("values.exact",), devices=2, timeout=2.0)
    result = run(subject("hangs"), replace(options, folder=tmp_path), server=server)
    assert result.exit_code is ExitCode.FAIL
    (hang,) = [group for group in result.failures if group.cause == "hang"]
    # A backend that always hangs must not cost as many timeouts as there are cases.
    assert hang.cases == MAX_HANGS
    assert result.cases < 2 * MAX_HANGS
    file = CaseFile.read(Path(hang.path))
    again = replay(file, profile=replace(PROFILES["quick"], timeout=2.0))
    assert again.outcome is Outcome.REPRODUCED
