"""``polyaccel conformance mutants``."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from polyaccel_conformance.errors import ExitCode, UsageError

HELP = "run planted bugs through the suite: does the check that must find each one find it?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="only these (default: all)")
    parser.add_argument("--seed", type=int, help="drawn cases of this seed instead of the fixed list")
    parser.add_argument("--matrix", type=Path, metavar="FILE.md", help="ask all checks of all cases; write a matrix")


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.checks.registry import CHECKS
    from polyaccel_conformance.mutants.score import Score, chosen, matrix, score
    from polyaccel_conformance.workers.process import ForkServer

    try:
        mutants = chosen(options.names)
    except KeyError as error:
        raise UsageError(f"no mutant {error.args[0]!r}") from error
    survivors: list[str] = []
    scores: list[Score] = []
    with closing(ForkServer()) as server:
        for mutant in mutants:
            checks = list(CHECKS) if options.matrix else [mutant.check]
            found = score(mutant, checks, mutant.operators, server, seed=options.seed, stop=options.matrix is None)
            scores.append(found)
            killed = found.kills.get(mutant.check, 0)
            if not killed:
                survivors.append(mutant.name)
            verdict = f"killed by {mutant.check}" if killed else f"SURVIVED {mutant.check}"
            print(f"{mutant.name:36} {verdict:34} {found.cases:4} cases {found.seconds:6.1f} s", flush=True)
    if options.matrix is not None:
        options.matrix.write_text(matrix(scores), encoding="utf-8")
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed")
    return ExitCode.FAIL if survivors else ExitCode.PASS
