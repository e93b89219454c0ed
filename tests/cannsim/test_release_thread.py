"""torch_npu's thread that frees what launches held leaves the processor to the simulated card."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from polyaccel_cannsim.simulator import Simulator

ASKS_EVERY = 500e-6


def asked() -> int:
    """How often the thread went to sleep so far."""
    for thread in Path(f"/proc/{os.getpid()}/task").iterdir():
        if (thread / "comm").read_text().strip() == "release_thread":
            lines = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
            return int(lines["voluntary_ctxt_switches"])
    raise AssertionError("torch_npu has no such thread any more")


def test_the_thread_that_frees_asks_for_work_no_oftener_than_it_is_told_to(cannsim: Simulator) -> None:
    x = torch.ones(3).npu()  # type: ignore[attr-defined]
    assert torch.equal((x + x).cpu(), torch.full((3,), 2.0))
    began, before = time.perf_counter(), asked()
    time.sleep(0.3)
    slept = asked() - before
    assert slept <= (time.perf_counter() - began) / ASKS_EVERY + 20
