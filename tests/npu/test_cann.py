"""Which CANN is new enough, by its own word, by what its package noted, and by what it exports."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import Query, TokenClass
from polyaccel_npu.cann import OLDEST, SINCE_OLDEST, installed, key, refusal
from polyaccel_npu.chip import chip_of
from polyaccel_npu.probe import available
from polyaccel_npu.support import GROUPED, supports

CARDS = ("Ascend910B3",)


def nothing(function: str) -> bool:
    return False


@pytest.mark.parametrize("version", ["7.0.RC1", "7.0.0", "8.0.RC1", "8.0.RC1.alpha003", "6.3.RC3", "8.0.T1"])
def test_an_older_cann_is_refused_by_its_name(version: str) -> None:
    said = refusal(version, lambda function: True)
    assert said == f"CANN {version} is older than {OLDEST}, the oldest that works here"


@pytest.mark.parametrize("version", [OLDEST, "8.0.RC2.alpha001", "8.0.RC3", "8.0.0", "8.0.1", "8.1.RC1", "10.0.RC1"])
def test_the_oldest_and_all_that_come_after_it_are_taken_whatever_they_export(version: str) -> None:
    assert refusal(version, nothing) == ""


@pytest.mark.parametrize("version", ["", "not known", "unknown"])
def test_without_a_version_the_exported_functions_decide(version: str) -> None:
    assert refusal(version, lambda function: function == SINCE_OLDEST) == ""
    assert SINCE_OLDEST in refusal(version, nothing)


@given(st.tuples(st.integers(0, 30), st.integers(0, 9), st.booleans(), st.integers(0, 12)))
def test_versions_are_ordered_by_their_numbers_and_candidates_come_before_releases(
    parts: tuple[int, int, bool, int],
) -> None:
    major, minor, release, last = parts
    assert key(f"{major}.{minor}.{'' if release else 'RC'}{last}") == parts
    refused = (major, minor, release, last) < (8, 0, False, 2)
    assert bool(refusal(f"{major}.{minor}.{'' if release else 'RC'}{last}", nothing)) == refused


def test_the_package_beside_the_libraries_is_asked_for_its_version(tmp_path: Path) -> None:
    folder = tmp_path / "aarch64-linux"
    folder.mkdir()
    note = "package_name=Ascend-cann-toolkit\nversion=8.0.RC1\ninnerversion=V100R001C17\narch=aarch64\n"
    (folder / "ascend_toolkit_install.info").write_text(note, encoding="utf-8")
    assert installed({"ASCEND_HOME_PATH": str(tmp_path)}) == "8.0.RC1"
    assert installed({"ASCEND_HOME_PATH": str(folder)}) == "8.0.RC1"
    assert installed({}) == installed({"ASCEND_HOME_PATH": str(tmp_path / "nowhere")}) == ""


def test_cards_under_a_cann_that_is_too_old_are_hardware_that_cannot_be_used() -> None:
    found = available(CARDS, True, "CANN 7.0.0 is older")
    assert (found.usable, found.hardware, found.reason, found.devices) == (False, True, "CANN 7.0.0 is older", CARDS)


BACKENDS = """
import json, sys
from polyaccel.backend import registry
from polyaccel.cli.main import main
{before}
main(["backends", "--json"])
try:
    registry.choose("npu")
    print("opened")
except registry.BackendUnavailable as error:
    print(type(error).__name__, error)
try:
    from polyaccel_npu.backend import NpuBackend
    print("handed over:", len(NpuBackend().devices()))
except registry.BackendUnavailable as error:
    print("handed over:", error)
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed")
@pytest.mark.parametrize("before", ["", "import torch_npu"], ids=["asked in a child", "asked in this process"])
@pytest.mark.parametrize(("cann", "usable"), [("8.0.RC1", False), (OLDEST, True)])
def test_the_list_of_backends_and_the_one_opened_say_that_cann_is_too_old(cann: str, usable: bool, before: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CANNSIM_", "ASCEND_"))}
    program = [sys.executable, "-c", BACKENDS.format(before=before)]
    done = subprocess.run(
        [sys.executable, "-m", "polyaccel_cannsim", "run", "--devices", "1", "--cann", cann, "--", *program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *listed, opened, direct = done.stdout.strip().splitlines()
    text = "\n".join(listed)
    rows = {row["name"]: row for row in json.loads(text[text.index("[") :])}
    assert rows["npu"]["usable"] == usable
    if usable:
        assert (opened, direct) == ("opened", "handed over: 1")
    else:
        assert f"CANN is older than {OLDEST}" in rows["npu"]["reason"]
        assert SINCE_OLDEST in rows["npu"]["reason"]
        assert opened.startswith("BackendUnavailable")
        assert f"CANN is older than {OLDEST}" in opened
        assert direct.startswith(f"handed over: CANN is older than {OLDEST}")


@pytest.mark.parametrize("operator", ["write_kv_cache", "qkv_rope_cache"])
@pytest.mark.parametrize("adapters", [False, True])
def test_what_a_cann_does_not_export_is_a_reason_in_the_plan(operator: str, adapters: bool) -> None:
    static = {"dtype": "float16", "heads": 4, "kv_heads": 2, "head_dim": 64, "k": 256, "slices": (256, 128, 128)}
    query = Query(
        site="s", operator=operator, token_class=TokenClass.DECODE, adapters=adapters, static=static, ranges={}
    )
    chip = chip_of("Ascend910B3")
    assert supports(operator, chip)(query) == []
    grouped = operator == "qkv_rope_cache" and adapters
    wanted = ["this CANN has no aclnnScatterPaKvCache", "this CANN has no aclnnGroupedMatmul"][: 1 + grouped]
    assert supports(operator, chip, nothing)(query) == wanted


@pytest.mark.parametrize("present", GROUPED)
def test_any_one_of_the_grouped_products_will_do(present: str) -> None:
    static = {"dtype": "float16", "k": 64, "slices": (64,)}
    query = Query(site="s", operator="sgmv", token_class=TokenClass.MIXED, adapters=True, static=static, ranges={})
    chip = chip_of("Ascend910B3")
    assert supports("sgmv", chip, lambda function: function == present)(query) == []
    assert supports("sgmv", chip, nothing)(query) == ["this CANN has no aclnnGroupedMatmul"]
