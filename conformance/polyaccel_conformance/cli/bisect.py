"""``polyaccel conformance bisect``."""

from __future__ import annotations

import argparse

from polyaccel_conformance.cli.options import add_subject_options, subject_of
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.models.questions import FAMILIES

HELP = "the first operator that makes a small model's answers disagree with the reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject_options(parser)
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0], help="the model (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="ranks to run it on (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    # The engine is imported by this command only.
    from polyaccel_conformance.models.bisect import bisect, bisect_ranks
    from polyaccel_conformance.models.engines import Workshop

    subject = subject_of(options)
    assert subject is not None
    if options.devices < 1:
        raise UsageError(f"--devices {options.devices}: at least 1")
    if options.devices > 1:
        found = bisect_ranks(subject, options.family, options.devices)
    else:
        with Workshop() as shop:
            found = bisect(subject.open, options.family, shop)
    print("\n".join(found.lines()))
    return ExitCode.FAIL if found.whole.wrong else ExitCode.PASS
