"""Whole programs and their children on simulated cards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyaccel_cannsim.cli import main
from polyaccel_cannsim.process import child_environment

RULES = {"CANNSIM_RULES": "tests.cannsim.rules"}


def test_children_of_a_program_see_the_same_cards(program: Any) -> None:
    out = program(
        """
        import subprocess, sys, torch
        text = "import torch; print('child', torch.npu.device_count(), torch.npu.get_device_name(0))"
        print(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout)
        """,
        **RULES,
        CANNSIM_DEVICES="3",
        CANNSIM_SOC="310P",
    )
    assert "child 3 Ascend310P3" in out


def test_the_status_of_the_program_is_handed_on(program: Any) -> None:
    program("import sys; sys.exit(7)", status=7)


def test_each_process_writes_its_ledger(program: Any, tmp_path: Path) -> None:
    text = "import torch, torch_npu; x = torch.ones(2, 4).npu(); torch_npu.npu_rms_norm(x, x[0].clone()); x.cpu()"
    program(text, **RULES, CANNSIM_LEDGER=str(tmp_path / "calls"))
    (file,) = tmp_path.iterdir()
    calls = [json.loads(line) for line in file.read_text().splitlines()]
    (norm,) = (call for call in calls if call["name"] == "aclnnRmsNorm")
    assert norm["device"] == 0
    assert norm["arguments"][0].startswith("float32[2, 4] stride [4, 1]")


def test_install_in_a_process_needs_no_launcher(program: Any) -> None:
    text = "import polyaccel_cannsim as c; m = c.install(devices=2); print(m.settings.devices, m is c.current())"
    assert "2 True" in program(text, **RULES, CANNSIM_ACTIVE="0")


def test_another_machine_in_one_process_is_refused(program: Any) -> None:
    text = "import torch, polyaccel_cannsim as c; c.install(devices=3); c.install(devices=2)"
    out = program(text, status=1, **RULES, CANNSIM_DEVICES="3")
    assert "simulated cards with devices 3 already: 2 needs a new process" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "a program is missing"),
        (["run", "--soc", "910Z", "--", "true"], "CANNSIM_SOC=910Z"),
        (["run", "--", "no-such-program"], "no program no-such-program"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_starts(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_the_child_environment_keeps_what_was_on_the_path_and_is_stable() -> None:
    once = child_environment({"PYTHONPATH": "/one:/two"})
    assert once["PYTHONPATH"].endswith("/one:/two")
    assert child_environment(once) == once


def test_a_hidden_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the other one')\n")
    environment = child_environment({"PYTHONPATH": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", "pass"], env=environment, capture_output=True, text=True)
    assert done.stdout == "the other one\n", done.stderr
