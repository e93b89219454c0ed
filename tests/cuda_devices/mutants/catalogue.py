"""Bugs that CUDA backends have had, planted in this one, and what must find each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tests.support.planted import Edit

PACKAGE = "polyaccel_cuda"


@dataclass(frozen=True)
class OnGpu:
    """The suite's fixed cases of these operators; ``checks`` of the suite, of which one must fail.

    ``gpus``: how many it takes; 0 where Triton's interpreter will do.
    """

    operators: tuple[str, ...]
    checks: tuple[str, ...] = ("values.exact", "values.bound")
    gpus: int = 0


@dataclass(frozen=True)
class ByTest:
    """A test of this project, by file and name."""

    test: str


Killer = OnGpu | ByTest


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    killer: Killer


LAUNCH = '        return self._launcher.launch(f"cuda.{kernel}", operands, fn, *args, **kwargs)\n'
MULTIPLY = '        operands = {"x": x, "weight": matrix}\n        if self.batch_invariant:'
WHERE = "            where = b + (low + ranks)[:, None] * n + columns[None, :]\n"
WAITS = "test_an_early_launch_waits_before_it_touches_memory_and_an_ordinary_one_does_not_wait"
ALL = (
    Mutant(
        "guard.no_device",
        "Kernels are launched on the current device, whichever their operands are on.",
        (
            Edit(
                "operators.py",
                LAUNCH,
                '        self._launcher.ledger.record(f"cuda.{kernel}")\n        return fn(*args, **kwargs)\n',
            ),
        ),
        OnGpu(("rms_norm", "silu_and_mul", "linear"), ("device.wrong_current",), gpus=2),
    ),
    Mutant(
        "guard.default_stream",
        "Kernels are launched on the default stream, whatever the current one is.",
        (
            Edit(
                "operators.py",
                LAUNCH,
                "        with torch.cuda.stream(torch.cuda.default_stream()):\n    " + LAUNCH,
            ),
        ),
        OnGpu(("rms_norm", "silu_and_mul", "linear"), ("stream.side",), gpus=1),
    ),
    Mutant(
        "step.stale_metadata",
        "A step's arrays are copied to the device once and never again.",
        (
            Edit(
                "arena.py",
                "        stage = self._next\n",
                "        stage = self._next\n        if stage:\n            return\n",
            ),
        ),
        OnGpu(("rotary_embedding", "embedding")),
    ),
    Mutant(
        "graph.grid_at_capture",
        "A graph's launches serve as many units as its capture had.",
        (Edit("units.py", "    most = rows if token_class is TokenClass.DECODE else total\n", "    most = total\n"),),
        OnGpu(("linear",), ("graph.replay",), gpus=1),
    ),
    Mutant(
        "graph.rank_rows_at_capture",
        "A graph's products cover the rank rows that its capture named.",
        (
            Edit(
                "graph.py",
                "        step.rank_rows = min(self.key.rank_rows, 0 if store is None else store.rank_rows)\n",
                "        step.rank_rows = rank_rows\n",
            ),
        ),
        OnGpu(("linear",), ("graph.replay",), gpus=1),
    ),
    Mutant(
        "cache.data_ptr",
        "A copy of a matrix is kept, and found again by the matrix's address.",
        (
            Edit("operators.py", "LONG_CONTEXT = 4096\n", "LONG_CONTEXT = 4096\n_KEPT: dict = {}\n"),
            Edit(
                "operators.py",
                MULTIPLY,
                "        matrix = _KEPT.setdefault(matrix.data_ptr(), matrix.clone())\n" + MULTIPLY,
            ),
        ),
        OnGpu(("linear", "column_linear", "gate_up_act")),
    ),
    Mutant(
        "early.no_wait",
        "A kernel that begins early does not wait for its predecessor.",
        (Edit("kernels/early.py", "        gdc_wait()\n        if EARLY == LETS:\n", "        if EARLY == LETS:\n"),),
        ByTest(f"tests/cuda/test_early.py::{WAITS}"),
    ),
    Mutant(
        "lone.deep_rank",
        "Of a row alone, rank rows beyond the tile that is read ahead are left out.",
        (
            Edit(
                "kernels/lone.py",
                "    for r in range(BLOCK_R, high, BLOCK_R):\n",
                "    for r in range(high, high, BLOCK_R):\n",
            ),
        ),
        OnGpu(("gate_up_act", "row_parallel_linear")),
    ),
    Mutant(
        "expand.rank_of_16",
        "Rank rows beyond a multiple of 16 are left out.",
        (
            Edit(
                "kernels/delta.py",
                "            known = ranks < high\n" + WHERE,
                "            known = ranks < high // 16 * 16\n" + WHERE,
            ),
        ),
        OnGpu(("sgmv", "row_parallel_linear")),
    ),
    Mutant(
        "few.tail",
        "The product of few rows stores beyond its last column.",
        (
            Edit(
                "kernels/few.py",
                "mask=present[:, None] & (columns < total)[None, :])\n",
                "mask=present[:, None] & (columns < total + 16)[None, :])\n",
            ),
        ),
        OnGpu(("linear",), ("values.exact", "values.bound", "memory.writes"), gpus=1),
    ),
    Mutant(
        "rope.padding_is_stored",
        "Keys and values of rows without a slot go to the first one.",
        (
            Edit(
                "kernels/rope.py",
                "        kept = slot >= 0\n",
                "        kept, slot = present, tl.where(slot < 0, 0, slot)\n",
            ),
        ),
        OnGpu(("qkv_rope_cache",), ("values.exact", "values.bound", "memory.inputs")),
    ),
    Mutant(
        "one_shot.skips_the_last",
        "The sum over ranks leaves the last rank's part out.",
        (
            Edit(
                "kernels/one_shot.py",
                "            for peer in tl.static_range(WORLD):\n",
                "            for peer in tl.static_range(WORLD - 1):\n",
            ),
        ),
        ByTest("tests/cuda/test_one_shot.py"),
    ),
)
MUTANTS: Mapping[str, Mutant] = MappingProxyType({mutant.name: mutant for mutant in ALL})
