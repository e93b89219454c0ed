"""Runs of mutants: each in fresh processes, until what must find it has found it.

``python -m tests.npu.mutants.hunt [NAME ...]`` prints a table: mutant, what found it, seconds; without names of all.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.npu.constraints.judge import faults
from tests.npu.constraints.pool import Pool, RankFailed
from tests.npu.mutants.mutant import Edit, Killer, Mutant, OnCard, OnRanks, environment, plant
from tests.support.planted import by_test, run

SECONDS = 240.0
BLUNDERS = ("NameError", "ImportError", "AttributeError", "SyntaxError", "TypeError")
CRASHES = tuple(f"{how}{blunder}" for how in ("crash: ", "E       ", "E   ") for blunder in BLUNDERS)
"""How findings begin that are about the mutant's own code: it must be a program that works and is wrong."""
REFUSED = re.compile(r"\baclnn\w+ failed|\[ERR01\d{3} OPS:")
"""What a refused operator is told by: the function of CANN that failed, or the module OPS of torch_npu's own checks."""


@dataclass(frozen=True)
class Score:
    """``found``: what was wrong, empty if nothing; ``by``: the check or test that says so.

    ``seconds``: wall clock; ``busy``: processor time of the processes.
    """

    found: str
    by: str
    seconds: float
    busy: float


def hunt(edits: tuple[Edit, ...], killer: Killer) -> Score:
    """Ask the killer about the sources with these edits; without any, about healthy ones through the same wrapper."""
    began, used = time.monotonic(), _used()
    with tempfile.TemporaryDirectory(prefix="npu-mutant-") as name:
        folder = Path(name).resolve()
        plant(edits, folder)
        if isinstance(killer, OnCard):
            found, by = _on_card(killer, folder)
        elif isinstance(killer, OnRanks):
            found, by = _on_ranks(killer, folder)
        else:
            found, by = by_test(killer.test, folder, SECONDS)
    return Score(found, by, time.monotonic() - began, _used() - used)


def _used() -> float:
    """Processor seconds of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _on_card(killer: OnCard, folder: Path) -> tuple[str, str]:
    words = [sys.executable, "-m", "tests.npu.mutants.on_card", str(folder)]
    done = run([*words, ",".join(killer.operators), ",".join(killer.checks)], folder, SECONDS)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, f"no answer, exit {done.returncode}:\n{done.stderr[-3000:]}"
    answer = json.loads(lines[-1])
    found = f"{answer['cause']}: {answer['message']}" if answer["check"] else ""
    return found, f"check {answer['check']} of {', '.join(killer.operators)}, case {answer['cases']}"


def _on_ranks(killer: OnRanks, folder: Path) -> tuple[str, str]:
    pool = Pool(killer.chip, killer.world, environment(folder))
    try:
        pool.open(killer.world)
        for number, case in enumerate(killer.cases, 1):
            answers = pool.call(case)
            found = [fault for one in answers for fault in faults(killer.chip, killer.world, case, one)]
            if found:
                first = next((fault for fault in found if fault.startswith(killer.fault)), found[0])
                return first, f"test_constraints_kept, {first.partition(':')[0]}, case {number}"
        wrong = pool.collect() if killer.collectives else []
        return (f"collectives: {wrong[0]}", "test_constraints_kept, collectives") if wrong else ("", "")
    except RankFailed as failed:
        # A rank that ends for another reason proves nothing about the tests. torch_npu refuses some operands itself.
        refused = REFUSED.search(str(failed))
        who = "torch_npu's" if refused and refused[0].startswith("[") else "CANN's"
        return f"{'refused' if refused else 'broken'}: {failed}", f"test_constraints_kept, {who} refusal"
    finally:
        pool.close()


def expected(killer: Killer, score: Score) -> bool:
    """Whether what was found is what must find it."""
    if isinstance(killer, OnRanks):
        return score.found.startswith(killer.fault)
    return bool(score.found) and not score.found.startswith(CRASHES)


def told(mutant: Mutant) -> Score:
    """Hunt one and print its line."""
    score = hunt(mutant.edits, mutant.killer)
    verdict = score.by if expected(mutant.killer, score) else f"SURVIVES {score.found[:200]}"
    print(f"{mutant.name:28} {score.seconds:6.1f} s, busy {score.busy:5.1f} s  {verdict}", flush=True)
    print(f"{'':28} {score.found.replace(chr(10), ' ')[:160]}", flush=True)
    return score


def main(names: list[str]) -> int:
    from tests.npu.mutants.catalogue import MUTANTS

    chosen = [MUTANTS[name] for name in names] or list(MUTANTS.values())
    scores = [(mutant, told(mutant)) for mutant in chosen]
    caught = sum(expected(mutant.killer, score) for mutant, score in scores)
    busy = sum(score.busy for _, score in scores)
    print(f"{caught} of {len(scores)} found, {sum(score.seconds for _, score in scores):.0f} s, busy {busy:.0f} s")
    return int(caught < len(scores))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
