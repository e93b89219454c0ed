"""Planted bugs are found, healthy sources pass through the same wrapper.

``python -m tests.npu.mutants.hunt`` prints a table of all of them. Each runs in fresh processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyaccel_conformance.errors import ExitCode
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.device import NpuDevice
from tests.npu.mutants.catalogue import MUTANTS
from tests.npu.mutants.hunt import expected, hunt
from tests.npu.mutants.mutant import ByTest, Killer, Mutant, OnCard, OnRanks, environment, misplaced, plant
from tests.npu.mutants.ranks import ALL

LONG = "POLYACCEL_LONG_TESTS"
AT_LEAST = 25
FEW = ("attention.sparse_mode", "lora.counts", "operands.no_contiguous")
"""Those that every run hunts; the others are asked for by the variable above."""
HEALTHY: dict[str, Killer] = {
    "one card": OnCard(("rms_norm", "silu_and_mul", "gelu", "rotary_embedding", "embedding", "linear")),
    "caches and adapters": OnCard(("write_kv_cache", "paged_attention", "sgmv")),
    "two ranks": OnRanks("", ALL, collectives=True),
    "three ranks": OnRanks("", ALL, world=3, collectives=True),
    "two ranks of A3": OnRanks("", ALL, chip="A3"),
}
simulated = pytest.mark.skipif(os.environ.get("CANNSIM_ACTIVE") != "1", reason="bugs are planted on simulated cards")


def chosen(mutant: Mutant) -> Any:
    marks = [] if mutant.name in FEW or os.environ.get(LONG) else [pytest.mark.skip(reason=f"set {LONG}=1")]
    return pytest.param(mutant, id=mutant.name, marks=marks)


def test_there_are_enough_and_each_edit_fits_the_sources_as_they_are() -> None:
    assert len(MUTANTS) >= AT_LEAST
    assert {mutant.name: misplaced(mutant.edits) for mutant in MUTANTS.values() if misplaced(mutant.edits)} == {}


@simulated
@pytest.mark.parametrize("mutant", [chosen(mutant) for mutant in MUTANTS.values()])
def test_a_planted_bug_is_found_by_what_must_find_it(mutant: Mutant) -> None:
    score = hunt(mutant.edits, mutant.killer)
    print(f"{mutant.name}: {score.by}, {score.seconds:.1f} s: {score.found[:200]}")
    assert expected(mutant.killer, score), f"{mutant.what} Found: {score.found or 'nothing'}"


@simulated
@pytest.mark.skipif(not os.environ.get(LONG), reason=f"set {LONG}=1")
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_sources_pass_through_the_same_wrapper(name: str) -> None:
    assert hunt((), HEALTHY[name]).found == ""


@simulated
@pytest.mark.skipif(not os.environ.get(LONG), reason=f"set {LONG}=1")
@pytest.mark.parametrize("test", sorted({m.killer.test for m in MUTANTS.values() if isinstance(m.killer, ByTest)}))
def test_healthy_sources_pass_the_tests_that_find_bugs(test: str) -> None:
    assert hunt((), ByTest(test)).found == ""


@simulated
@pytest.mark.skipif(not os.environ.get(LONG), reason=f"set {LONG}=1")
@pytest.mark.parametrize("name", ["", "swiglu.halves"])
def test_the_public_command_fails_a_planted_bug_and_passes_healthy_sources(name: str, tmp_path: Path) -> None:
    """As a user runs it, with worker processes of the suite's own."""
    plant(MUTANTS[name].edits if name else (), tmp_path)
    words = ["run", "--backend", "npu", "--operators", "silu_and_mul", "--checks", "values.bound,values.exact"]
    words += ["--profile", "quick", "--no-shrink", "--no-progress", "--workers", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "polyaccel_conformance", *words],
        env=dict(environment(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == (ExitCode.FAIL if name else ExitCode.PASS), done.stdout[-3000:] + done.stderr[-2000:]


def test_a_call_on_another_card_than_the_current_one_enters_it(backend: NpuBackend) -> None:
    """And leaves it: the caller's card is current again afterwards."""
    import torch

    from polyaccel_npu import runtime

    npu, (first, second, *_) = runtime.npu(), backend.devices()
    npu.set_device(first.torch_device)
    seen: list[int] = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(npu.current_device())
        return x + 1

    x = second.upload(torch.ones(4))
    y = backend.launcher.launch("npu.watched", {"x": x}, watched, x)
    assert seen == [1]
    assert npu.current_device() == 0
    assert y.cpu().tolist() == [2.0] * 4


def test_blame_names_the_call_that_fails_among_others(device: NpuDevice) -> None:
    import torch

    from polyaccel_npu import runtime
    from polyaccel_npu.journal import Journal
    from polyaccel_npu.replay import blame

    x, w, gamma = (device.upload(torch.ones(*shape).half()) for shape in ((8, 4), (16, 8), (4,)))
    journal, ops = Journal(), runtime.ops()
    journal.note("rms_norm", ops.npu_rms_norm, (x, gamma, 1e-5), {})
    journal.note("mm_all_reduce_base", ops.npu_mm_all_reduce_base, (x.t(), w.t(), "group"), {})
    journal.note("rms_norm", ops.npu_rms_norm, (x, gamma, 1e-5), {})
    said = blame(journal, device.index, 3)
    assert "call 2 of 3 of rank 3, npu.mm_all_reduce_base: aclnnMatmulAllReduce" in said
