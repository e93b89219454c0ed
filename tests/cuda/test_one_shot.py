"""The sum over ranks as one kernel: processes in Triton's interpreter that share memory, and the compiler's answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.plugins import ROOT

pytest.importorskip("triton", reason="run tox -e triton")


def _start(module: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    # Whether the package is installed or found through pytest's own path.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_end_with_the_same_bits_and_none_waits_for_ever(world: int, tmp_path: Path) -> None:
    from polyaccel_cuda.kernels import one_shot

    for rank in range(world):
        (tmp_path / f"rank{rank}").write_bytes(bytes(one_shot.BUFFER_BYTES))
    ranks = [
        _start("tests.cuda.one_shot_rank", str(rank), str(world), str(tmp_path), TRITON_INTERPRET="1")
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=240)
            assert (out, rank.returncode) == ("done\n", 0), err[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


def test_the_compiler_takes_it_and_reads_peers_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    compiling = _start("tests.cuda.one_shot_compiled", TRITON_CACHE_DIR=str(tmp_path))
    out, err = compiling.communicate(timeout=240)
    assert compiling.returncode == 0, err[-3000:]
    assert out.splitlines() == [
        "sm_80 of 2: 1 wide reads of peers, 1 flags",
        "sm_90 of 2: 1 wide reads of peers, 1 flags",
        "sm_90 of 8: 7 wide reads of peers, 7 flags",
    ]
