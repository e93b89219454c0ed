"""Runs of mutants of the CUDA backend: each in fresh processes, until what must find it has found it.

``python -m tests.cuda_devices.mutants.hunt [NAME ...]`` prints a line a mutant; without names of all that can be asked
here: some need GPUs, others Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.cuda_devices.mutants.catalogue import MUTANTS, PACKAGE, ByTest, Killer, Mutant, OnGpu
from tests.support.planted import by_test, plant, run

SECONDS = 400.0
BLUNDERS = ("NameError", "ImportError", "AttributeError", "SyntaxError", "TypeError", "CompilationError")
"""What is about the mutant's own code: it must be a program that works and is wrong."""
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def lacks(killer: Killer) -> str:
    """Why this run cannot ask."""
    if isinstance(killer, ByTest) and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs Triton's interpreter: set TRITON_INTERPRET=1"
    needed = killer.gpus if isinstance(killer, OnGpu) else 0
    return f"needs {needed} GPUs, this machine has {GPUS}" if needed > GPUS else ""


def hunt(mutant: Mutant, *, planted: bool = True, most: int = 120) -> tuple[str, str]:
    """What was found, empty if nothing, and by what. Not ``planted``: healthy sources through the same wrapper."""
    with tempfile.TemporaryDirectory(prefix="cuda-mutant-") as name:
        folder = Path(name).resolve()
        plant(PACKAGE, mutant.edits if planted else (), folder)
        if isinstance(mutant.killer, ByTest):
            return by_test(mutant.killer.test, folder, SECONDS)
        return _on_gpu(mutant.killer, folder, most)


def _on_gpu(killer: OnGpu, folder: Path, most: int) -> tuple[str, str]:
    words = [sys.executable, "-W", "ignore", "-m", "tests.cuda_devices.mutants.on_gpu", str(folder)]
    done = run([*words, ",".join(killer.operators), ",".join(killer.checks), str(most)], folder, SECONDS)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, f"no answer, exit {done.returncode}:\n{done.stderr[-3000:]}"
    answer = json.loads(lines[-1])
    assert not answer["cannot"], answer["cannot"]
    found = f"{answer['cause']}: {answer['message']}" if answer["check"] else ""
    return found, f"check {answer['check']} of {', '.join(killer.operators)}, case {answer['cases']}"


def caught(found: str) -> bool:
    return bool(found) and not any(blunder in found for blunder in BLUNDERS)


def main(names: list[str]) -> int:
    survivors = 0
    for mutant in [MUTANTS[name] for name in names] or MUTANTS.values():
        reason = lacks(mutant.killer)
        if reason:
            print(f"{mutant.name:28} {reason}", flush=True)
            continue
        began = time.monotonic()
        found, by = hunt(mutant)
        survivors += not caught(found)
        verdict = by if caught(found) else "SURVIVES"
        print(f"{mutant.name:28} {time.monotonic() - began:6.1f} s  {verdict}: {found[:140]!r}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
