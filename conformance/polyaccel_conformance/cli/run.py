"""``polyaccel conformance run``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from polyaccel_conformance.cli import power
from polyaccel_conformance.cli.blocks import failure_block, summary
from polyaccel_conformance.cli.conclusion import conclude, ready
from polyaccel_conformance.cli.options import add_subject_options, names, subject_of
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.profiles import PROFILES
from polyaccel_conformance.progress import ProgressLine
from polyaccel_conformance.results import FailureGroup
from polyaccel_conformance.runner import Options
from polyaccel_conformance.runner import run as run_suite
from polyaccel_conformance.waivers import read_waivers

HELP = "test a backend, or a table of kernels, operator by operator"
RESULT = "result.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject_options(parser)
    parser.add_argument("--profile", default="default", choices=list(PROFILES), help="how many cases are drawn")
    parser.add_argument("--seed", type=int, help="of drawn cases; certify and fuzz draw a fresh one unless it is given")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="ranks at most (default: 1)")
    parser.add_argument("--operators", metavar="NAME,...", help="only these")
    parser.add_argument("--checks", metavar="NAME,...", help="only these")
    parser.add_argument(
        "-k", dest="selection", default="", metavar="EXPRESSION", help="only cases like 'dtype=float16 and not offset'"
    )
    parser.add_argument("--no-corpus", action="store_true", help="only drawn cases, without the fixed lists")
    parser.add_argument("--failed", action="store_true", help="only the cases that failed last time")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was broken off")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after that; --resume goes on")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="after which a case counts as hanging")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 2), metavar="N", help="processes")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for results and case files (default: conformance-results/<name>)"
    )
    parser.add_argument("--stop-at", default="", metavar="CHECK", help="end at the first failure of this check")
    parser.add_argument("--no-shrink", action="store_true", help="show failing cases as they are")
    parser.add_argument("--waivers", type=Path, metavar="FILE.toml", help="known failures, see the documentation")
    parser.add_argument("--require-native", action="store_true", help="a composite denies its levels")
    parser.add_argument("--bundle", type=Path, metavar="FILE.tar.xz", help="a certificate if the run earned one")
    parser.add_argument("--no-progress", action="store_true")


class _Console:
    """Prints failures as they are found, around the progress line."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line

    def progress(self, done: int, expected: int, failed: int, now: str) -> None:
        self._line.update(done, expected, failed, now)

    def failure(self, group: FailureGroup) -> None:
        self._line.clear()
        print(failure_block(group, so_far=True), flush=True)


def run(options: argparse.Namespace) -> int:
    subject = subject_of(options)
    if subject is None:
        raise UsageError("--backend or --table is needed")
    if options.workers < 1:
        raise UsageError(f"--workers {options.workers}: at least one is needed")
    if options.waivers is not None:
        # A file that cannot be read is said now, not after the run.
        read_waivers(options.waivers)
    if not ready(subject):
        return ExitCode.FAIL
    folder = options.out if options.out is not None else Path("conformance-results") / subject.name.lower()
    line = ProgressLine(enabled=not options.no_progress)
    result = run_suite(
        subject,
        Options(
            profile=options.profile,
            seed=options.seed,
            operators=names(options.operators),
            checks=names(options.checks),
            selection=options.selection,
            devices=options.devices,
            workers=options.workers,
            timeout=options.timeout,
            budget=options.budget,
            folder=folder,
            resume=options.resume,
            failed=options.failed,
            stop_at=options.stop_at,
            shrink=not options.no_shrink,
            corpus=not options.no_corpus,
        ),
        _Console(line),
    )
    line.clear()
    (folder / RESULT).write_text(json.dumps(result.to_json()) + "\n", encoding="utf-8")
    print(summary(result))
    powerful = power.shown(result, folder) if power.asked(result) else True
    code = conclude(result, folder, options.waivers, options.require_native, options.bundle)
    # A suite that does not find what is planted on this device says nothing of it.
    return ExitCode.INCONCLUSIVE if code is ExitCode.PASS and not powerful else code
