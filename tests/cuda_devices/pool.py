"""Ranks on GPUs: one process each, which runs named cases of :mod:`tests.cuda_devices.cases` and reports in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
several = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 CUDA devices, this machine has {GPUS}")
OK = "ok"


def run_cases(world: int, names: list[str], seconds: float) -> dict[str, list[str]]:
    """By case what each rank says: :data:`OK`, or what went wrong. Ranks that do not end in time are killed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])}
        module = "tests.cuda_devices.pool"
        logs = [open(Path(folder) / f"log{rank}", "w+") for rank in range(world)]  # noqa: SIM115
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(rank), str(world), folder, *names],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + seconds
        endings = []
        for rank in ranks:
            try:
                endings.append(f"exited with {rank.wait(max(0.1, deadline - time.monotonic()))}")
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
                endings.append(f"did not end within {seconds:g} s")
        found: dict[str, list[str]] = {}
        for name in names:
            found[name] = [
                _answer(Path(folder) / f"{name}.{rank}", endings[rank], Path(folder) / f"log{rank}")
                for rank in range(world)
            ]
        found["end"] = [OK if ending == "exited with 0" else ending for ending in endings]
        for log in logs:
            log.close()
        return found


def _answer(path: Path, ending: str, log: Path) -> str:
    if path.exists():
        return str(json.loads(path.read_text()))
    return f"no answer, {ending}: {log.read_text()[-1500:]}"


def main(rank: int, world: int, folder: Path, names: list[str]) -> None:
    from tests.cuda_devices import cases
    from tests.cuda_devices.rank import Rank

    begun, known = time.monotonic(), {case.__name__: case for case in (*cases.ALL, *cases.LAYERS)}
    with Rank(rank, world, folder) as here:
        for name in names:
            try:
                known[name](here)
                answer = OK
            except Exception:
                answer = traceback.format_exc()[-2500:]
            (folder / f"{name}.{rank}").write_text(json.dumps(answer))
            print(f"{time.monotonic() - begun:.1f} s {name}: {answer}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
