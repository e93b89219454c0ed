"""Runs the stages that have not passed yet, and writes log and support page."""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from polyaccel_conformance.certificate.bundle import read_bundle
from polyaccel_conformance.report.support import support
from tests.certify.backends import BACKENDS, FAILING, Installed
from tests.certify.log import page
from tests.certify.stages import (
    Certificate,
    Command,
    FreshSeed,
    Place,
    Refused,
    Stage,
    Tests,
    folders_of_tests,
)
from tests.certify.state import State
from tests.support.plugins import ROOT

SEEDS = 10
SHORTEST = 60.0
"""Seconds of a budget below which no further stage is begun."""


def stages(seeds: Sequence[int]) -> list[Stage]:
    """All of them, the ones that certificates need first."""
    found: list[Stage] = [Certificate(tested=tested) for tested in BACKENDS]
    found += [Refused(backend=name) for name in FAILING]
    found += [FreshSeed(seed=seed) for seed in seeds]
    found += [Tests(folder=folder) for folder in folders_of_tests()]
    suite = "polyaccel_conformance"
    found.append(Command(name="mutants", words=("-m", suite, "mutants")))
    found.append(Command(name="mutants of three seeds", words=("-m", suite, "mutants", "--seeds", "3")))
    given = ("--survivors", "tests/conformance/mutation/survivors.toml", "--tests", "tests/backend/composite")
    words = ("-m", f"{suite}.mutation", *given, "--folder", "{work}/mutation")
    found.append(Command(name="mutation", words=words, in_parts=True))
    found.append(Certificate(tested=BACKENDS[0], profile="certify"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every stage that was asked for has passed; 1: one failed; 3: some are left, run it again."""
    options = _options(arguments)
    state = State.read(options.work / "state.json")
    if not state.seeds:
        state.seeds = [random.SystemRandom().randrange(2**32) for _ in range(SEEDS)]
        state.write()
    every = stages(state.seeds)
    chosen = [stage for stage in every if not options.only or any(word in stage.name for word in options.only)]
    if options.list:
        print("\n".join(f"{_verdict(state, stage):<8} {stage.name}" for stage in chosen))
        return 0
    place = Place(
        # Results of other sources cannot be gone on with.
        work=options.work / hashlib.sha256(state.sources.encode()).hexdigest()[:8],
        certificates=options.certificates,
        installed=Installed(options.work / "installed"),
        profile=options.profile,
        more=tuple(options.more.split()),
    )
    deadline = None if options.budget is None else time.monotonic() + options.budget
    for stage in chosen:
        if _verdict(state, stage) == "passed":
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left < SHORTEST:
            break
        outcome = stage.run(place, left)
        state.note(stage.name, outcome)
        print(f"{outcome.verdict:<8} {stage.name}: {outcome.figures} ({outcome.seconds:.0f} s)", flush=True)
    _write_pages(options.certificates, state, every)
    verdicts = {_verdict(state, stage) for stage in chosen}
    return 1 if "failed" in verdicts else 0 if verdicts == {"passed"} else 3


def _verdict(state: State, stage: Stage) -> str:
    found = state.outcomes.get(stage.name)
    return "left" if found is None else found.verdict


def _write_pages(certificates: Path, state: State, every: Sequence[Stage]) -> None:
    certificates.mkdir(parents=True, exist_ok=True)
    (certificates / "log.md").write_text(page(state, [stage.name for stage in every]), encoding="utf-8")
    bundles = [read_bundle(path) for path in sorted(certificates.glob("*.tar.xz"))]
    (certificates.parent / "support.md").write_text(support(bundles), encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.certify", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="stages whose name holds one of these")
    parser.add_argument("--list", action="store_true", help="say what has been done and run nothing")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for this part; run it again to go on")
    parser.add_argument("--work", type=Path, default=ROOT / "conformance-results" / "certify", metavar="FOLDER")
    parser.add_argument("--certificates", type=Path, default=ROOT / "docs" / "certificates", metavar="FOLDER")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--more", default="", metavar="OPTIONS", help="of every run, to try this program on little")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
