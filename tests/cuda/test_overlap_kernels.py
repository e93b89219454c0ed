"""Kernels that exchange data: processes in Triton's interpreter that share memory, and the compiler's answer."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="run tox -e triton")

from tests.cuda.test_one_shot import _start


@pytest.mark.parametrize(
    ("what", "world"), [("two_shots", 2), ("two_shots", 3), ("norms", 2), ("norms", 3), ("parts", 2)]
)
def test_ranks_end_with_the_same_bits_and_none_waits_for_ever(what: str, world: int, tmp_path: Path) -> None:
    from polyaccel_cuda import symmetric

    for rank in range(world):
        with open(tmp_path / f"rank{rank}", "wb") as file:
            file.truncate(symmetric.places(world).total)
    ranks = [
        _start("tests.cuda.exchange_rank", what, str(rank), str(world), str(tmp_path), TRITON_INTERPRET="1")
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=240)
            assert (out, rank.returncode) == ("done\n", 0), err[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


def test_the_compiler_takes_them_and_reaches_peers_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    compiling = _start("tests.cuda.exchange_compiled", TRITON_CACHE_DIR=str(tmp_path))
    out, err = compiling.communicate(timeout=240)
    assert compiling.returncode == 0, err[-3000:]
    print(out)
