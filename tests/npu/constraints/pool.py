"""Ranks on simulated cards of one chip, kept as long as a test module needs them."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.npu.constraints.case import StationCase
from tests.npu.constraints.rank import ANSWER

SECONDS = 200.0


class RankFailed(AssertionError):
    """A rank ended, said nothing, or raised."""


class Pool:
    """``size`` processes, each with a card of its own. One group at a time.

    Args:
        chip: as the simulator names it.
        environment: variables beside this process's own.
    """

    def __init__(self, chip: str, size: int, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="npu-ranks-")
        self._numbers = itertools.count()
        self._world = 0
        variables = {
            **os.environ,
            "CANNSIM_SOC": chip,
            "CANNSIM_DEVICES": str(max(size, 1)),
            "CANNSIM_HCCL_FOLDER": str(Path(self._folder.name) / "hccl"),
            **(environment or {}),
        }
        self._ranks = [Process(rank, variables, Path(self._folder.name)) for rank in range(size)]
        for rank in self._ranks:
            rank.answer()

    def open(self, world: int) -> None:
        """A group of the first ``world`` ranks, with new backend instances."""
        if self._world:
            self.close_group()
        address = str(Path(self._folder.name) / f"world-{next(self._numbers)}")
        self._all(world, {"do": "open", "world": world, "address": address})
        self._world = world

    def close_group(self) -> None:
        world, self._world = self._world, 0
        self._all(world, {"do": "close"})

    def call(self, case: StationCase) -> list[dict[str, Any]]:
        """Run a case on all ranks of the group; what each answers.

        Raises:
            RankFailed: with the rank's own words.
        """
        return self._all(self._world, {"do": "call", "case": case.plain(), "number": next(self._numbers)})

    def collect(self) -> list[str]:
        """Every collective once; what is wrong with any of them on any rank."""
        answers = self._all(self._world, {"do": "collect"})
        return [f"rank {rank}: {wrong}" for rank, one in enumerate(answers) for wrong in one["wrong"]]

    def close(self) -> None:
        for rank in self._ranks:
            rank.end()
        self._folder.cleanup()

    def _all(self, world: int, order: Mapping[str, Any]) -> list[dict[str, Any]]:
        ranks = self._ranks[:world]
        for rank in ranks:
            rank.send(order)
        answers = [rank.answer() for rank in ranks]
        failed = [f"rank {i}: {a['error']}\n{a['trace']}" for i, a in enumerate(answers) if "error" in a]
        if failed:
            raise RankFailed("\n".join(failed))
        return answers


class Process:
    """One rank, and the thread that reads it."""

    def __init__(self, rank: int, environment: Mapping[str, str], folder: Path) -> None:
        self._log = (folder / f"rank-{rank}.log").open("w+b")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.npu.constraints.rank", str(rank)],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, order: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=SECONDS)
        except queue.Empty:
            raise RankFailed(f"no answer within {SECONDS:g} s:\n{self._tail()}") from None
        if line is None:
            raise RankFailed(f"the rank ended with {self._child.wait()}:\n{self._tail()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(15)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join(5)
        self._log.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(ANSWER):
                self._answers.put(line.removeprefix(ANSWER))
        self._answers.put(None)

    def _tail(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]
