"""``polyaccel conformance mutants``."""

from __future__ import annotations

import argparse
import datetime
import random
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.subject import Subject

if TYPE_CHECKING:
    from polyaccel_conformance.mutants.mutant import Mutant
    from polyaccel_conformance.mutants.series import Outcome
    from polyaccel_conformance.workers.process import ForkServer

HELP = "run planted bugs through the suite: does the check that must find each one find it?"
FRESH = 2**31


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="only these (default: all)")
    parser.add_argument("--seed", type=int, help="of drawn cases; of several, the first")
    parser.add_argument(
        "--matrix",
        type=Path,
        metavar="FILE.md",
        help="all checks on all cases: write a page, and what was measured as JSON beside it",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="drawn cases alone, N fresh seeds; with --matrix they go to its page"
    )
    series = parser.add_mutually_exclusive_group()
    series.add_argument("--by-date", type=int, metavar="N", help="N mutants chosen by date, on the whole of quick")
    series.add_argument("--backend", metavar="NAME", help="ten, planted around this backend's own operators")


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.mutants.choice import chosen
    from polyaccel_conformance.workers.process import ForkServer

    mutants = chosen(options.names)
    with closing(ForkServer()) as server:
        if options.seeds is None and options.matrix is not None:
            return _matrix(mutants, server, options)
        return _concluded(_series(mutants, server, options))


def _series(mutants: list[Mutant], server: ForkServer, options: argparse.Namespace) -> Outcome:
    from polyaccel_conformance.mutants import series
    from polyaccel_conformance.mutants.records import Records

    say = partial(print, flush=True)
    # A date anywhere on earth: what matters is that it changes.
    today = datetime.datetime.now(datetime.UTC).date()
    if options.by_date is not None:
        return series.whole_of_quick(options.by_date, today, server, say)
    if options.backend is not None:
        return series.around(Subject(name=options.backend), today, server, say)
    if options.seeds is not None:
        first = random.SystemRandom().randrange(FRESH) if options.seed is None else options.seed
        records = Records(None if options.matrix is None else options.matrix.with_suffix(".json"))
        return series.on_seeds(mutants, range(first, first + options.seeds), server, say, records)
    return series.hunts(mutants, server, say, seed=options.seed or 0)


def _matrix(mutants: list[Mutant], server: ForkServer, options: argparse.Namespace) -> int:
    from polyaccel_conformance.mutants.series import matrix

    found = matrix(mutants, options.matrix, server, partial(print, flush=True), again=bool(options.names))
    for problem in found:
        print(f"FAILED {problem}")
    print(f"wrote {options.matrix}")
    return ExitCode.FAIL if found else ExitCode.PASS


def _concluded(outcome: Outcome) -> int:
    for name in outcome.missed:
        print(f"FAILED {name} survives")
    print(outcome.summary)
    return ExitCode.FAIL if outcome.missed else ExitCode.PASS
