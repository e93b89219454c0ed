"""``polyaccel conformance replay``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyaccel_conformance.casefile import CaseFile
from polyaccel_conformance.cli.blocks import describe, failure_block
from polyaccel_conformance.cli.options import add_subject_options, subject_of
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.replay import dump_case, replay
from polyaccel_conformance.results import FailureGroup
from polyaccel_conformance.standalone import write_standalone

HELP = "run the case of a case file again: REPRODUCED (exit code 1), NOT REPRODUCED (0) or DIFFERENT FAILURE (5)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", type=Path, metavar="CASE.json")
    add_subject_options(parser, required=False)
    parser.add_argument("--all-checks", action="store_true", help="ask every check, not only the one that failed")
    parser.add_argument("--dump", type=Path, metavar="FILE.npz", help="write inputs, expected values and outputs")
    parser.add_argument(
        "--standalone", type=Path, metavar="FILE.py", help="write one script that needs torch and numpy alone"
    )


def run(options: argparse.Namespace) -> int:
    file = CaseFile.read(options.case)
    subject = subject_of(options)
    if subject is not None:
        file = replace(file, subject=subject)
    for path, ending in ((options.dump, ".npz"), (options.standalone, ".py")):
        if path is not None and path.suffix != ending:
            raise UsageError(f"{path} does not end in {ending}")
    found = replay(file, every_check=options.all_checks)
    print(f"case: {describe(file.case)} on {file.subject.label}")
    for change in file.revision_changes():
        print(f"revision changed: {change}")
    print(f"inputs identical: {'yes' if found.inputs_identical else 'no (' + ', '.join(found.differing) + ')'}")
    print(f"outputs identical: {'yes' if found.same_output else 'no'}")
    print(found.outcome.value)
    for failure in found.result.failures:
        group = FailureGroup(
            operator=file.case.operator,
            check=failure.check,
            cause=failure.cause,
            cases=1,
            failure=failure,
            result=found.result,
            original=file.case,
        )
        print(failure_block(group))
    if options.dump is not None or options.standalone is not None:
        _write(options, file)
    return found.exit_code


def _write(options: argparse.Namespace, file: CaseFile) -> None:
    from polyaccel_conformance.problems.registry import PROBLEM_SETS

    archive = dump_case(file)
    if options.dump is not None:
        np.savez_compressed(options.dump, allow_pickle=False, **archive)
        print(f"wrote {options.dump}")
    if options.standalone is not None:
        problem = PROBLEM_SETS[file.case.operator].problem(file.case)
        write_standalone(options.standalone, file, problem, archive)
        print(f"wrote {options.standalone}")
