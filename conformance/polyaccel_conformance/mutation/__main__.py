"""``python -m polyaccel_conformance.mutation``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from polyaccel_conformance.errors import ConformanceError, ExitCode, UsageError
from polyaccel_conformance.mutation import subject
from polyaccel_conformance.mutation.campaign import Campaign, Outcome, State, run
from polyaccel_conformance.mutation.coverage import kept
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.install import all_edits, digests
from polyaccel_conformance.mutation.survivors import REQUIRED, Verdict, entry, judge, read_survivors
from polyaccel_conformance.mutation.table import by, markdown, write
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer

DESCRIPTION = "change the sources of the composites by rule, one expression at a time: does some case fail?"
LIMIT = 40


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m polyaccel_conformance.mutation", description=DESCRIPTION)
    found.add_argument("--survivors", type=Path, metavar="FILE.toml", help="explained survivors")
    found.add_argument("--tests", type=Path, metavar="FOLDER", help="unit tests to ask what no case kills")
    found.add_argument("--folder", type=Path, default=Path("mutation-results"), help="what was run is kept here")
    found.add_argument("--table", type=Path, metavar="FILE.md", help="write the result there")
    found.add_argument("--budget", type=float, metavar="SECONDS", help="stop then; the next run goes on")
    found.add_argument("--again", action="store_true", help="run survivors again")
    found.add_argument("--limit", type=int, default=LIMIT, help="cases with further checks, for one mutant; 0: all")
    found.add_argument("-k", dest="word", default="", metavar="TEXT", help="only those with this in FILE:LINE or line")
    found.add_argument("--list", action="store_true", help="only list the mutants")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    options = parser().parse_args(arguments)
    chosen = [edit for edit in all_edits() if options.word in f"{edit.where} {edit.text}"]
    if options.list:
        for edit in chosen:
            print(_line(edit))
        return ExitCode.PASS
    try:
        return _run(options, chosen)
    except UsageError as error:
        print(error, file=sys.stderr)
        return ExitCode.USAGE
    except ConformanceError as error:
        print(error, file=sys.stderr)
        return ExitCode.INCONCLUSIVE


def _run(options: argparse.Namespace, chosen: Sequence[Edit]) -> int:
    explained = read_survivors(options.survivors) if options.survivors else ()
    options.folder.mkdir(parents=True, exist_ok=True)
    state = State(options.folder / "outcomes.json", digests())
    if options.again:
        state.forget_survivors()
    deadline = None if options.budget is None else time.monotonic() + options.budget
    healthy = Subject(kind="table", path=subject.__file__, name=subject.HEALTHY)
    with closing(ForkServer(preload=("pytest",) if options.tests else ())) as server:
        coverage = kept(options.folder / "coverage.json", healthy, server)
        campaign = Campaign(healthy, coverage, server, limit=options.limit, tests=options.tests)
        with closing(campaign):
            whole = run(campaign, chosen, state, deadline, _show)
            unsound = [*coverage.failing, *campaign.unsound]
    verdict = judge(chosen, state.outcomes, explained)
    print("\n".join(by(lambda edit: edit.file, chosen, state.outcomes, "file")))
    if options.table:
        write(options.table, markdown(chosen, state.outcomes, explained))
    if not whole:
        print(f"{verdict.run} of {len(chosen)} mutants were run; the same command goes on")
        return ExitCode.INCONCLUSIVE
    for text in unsound:
        print(f"fails without any change: {text}")
    status = _conclude(verdict)
    return ExitCode.INCONCLUSIVE if unsound and status == ExitCode.PASS else status


def _conclude(verdict: Verdict) -> ExitCode:
    for edit in verdict.unexplained:
        print(f"SURVIVED, not explained: {_line(edit)}\n{entry(edit)}")
    for explanation in verdict.stale:
        print(f"explained, but killed or gone: {explanation.key}")
    print(f"{verdict.killed} of {verdict.run} killed, {verdict.rate:.1%}; {REQUIRED:.0%} are required")
    return ExitCode.PASS if verdict.passed else ExitCode.FAIL


def _show(edit: Edit, outcome: Outcome) -> None:
    verdict = f"killed by {outcome.killed}" if outcome.killed else "SURVIVED"
    print(f"{_line(edit)}  {verdict}, {outcome.cases} cases, {outcome.seconds:.1f} s", flush=True)


def _line(edit: Edit) -> str:
    before, after = (" ".join(text.split()) for text in (edit.before, edit.after))
    return f"{edit.where} {edit.kind}: {before} -> {after}"


if __name__ == "__main__":
    sys.exit(main())
