"""Launches that begin before their predecessor ends touch nothing until it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.plugins import ROOT

Lines = Sequence[Mapping[str, Any]]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    folder: Path = tmp_path_factory.mktemp("early")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda.early_compiled"]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_of_a_decode_step_is_launched_early_in_a_capture_and_only_there(lines: Lines) -> None:
    kernels = {line["kernel"] for line in lines}
    assert len(kernels) == 14
    for early in (True, False):
        assert {line["kernel"] for line in lines if line["early"] is early} == kernels
    assert all(bool(line["asked"]) is line["early"] for line in lines)


def test_a_row_alone_in_its_unit_is_not_read_through_shared_memory_rank_row_by_rank_row(lines: Lines) -> None:
    alone = [line for line in lines if line["kernel"] == "lone_silu_and_mul_kernel" and line["tokens"] > 1]
    assert alone
    # A tensor of one element that is read in a loop is: 256 reads, and twice the time.
    assert all(line["shared_reads"] < 16 for line in alone)


def test_an_early_launch_waits_before_it_touches_memory_and_an_ordinary_one_does_not_wait(lines: Lines) -> None:
    for line in lines:
        order = line["order"]
        if not line["early"]:
            assert not any(name.startswith("griddepcontrol") for name in order), line["kernel"]
            assert any("global" in name for name in order), line["kernel"]
            continue
        waits = order.index("griddepcontrol.wait")
        before, after = order[:waits], order[waits:]
        # What a row alone needs of the step's tables and the adapters was there before the step: it may be read.
        reads = "ld.global" if line["kernel"].startswith("lone_") else "nothing"
        assert all(name.startswith(reads) for name in before), line["kernel"]
        assert any("global" in name for name in after), line["kernel"]
        assert any(name.startswith(("st.", "atom.", "red.")) for name in after), line["kernel"]


def test_a_successor_may_start_only_after_the_wait_and_where_that_was_measured_to_pay(lines: Lines) -> None:
    for line in lines:
        order = line["order"]
        lets = [place for place, name in enumerate(order) if name == "griddepcontrol.launch_dependents"]
        assert lets == ([order.index("griddepcontrol.wait") + 1] if line["asked"] == 1 else []), line["kernel"]
        if line["early"]:
            product = line["kernel"] in ("one_row_kernel", "few_rows_kernel", "one_shot_all_reduce_kernel")
            at_once = product or line["tokens"] == 1 or line["kernel"].startswith("lone_")
            assert (line["asked"] == 1) is at_once, line["kernel"]
