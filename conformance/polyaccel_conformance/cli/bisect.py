"""``polyaccel conformance bisect``."""

from __future__ import annotations

import argparse

from polyaccel_conformance.cli.options import add_subject_options, subject_of
from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.models.questions import FAMILIES

HELP = "the first operator that makes a small model's answers disagree with the reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject_options(parser)
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0], help="the model (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    # The engine is imported by this command only.
    from polyaccel_conformance.models.bisect import bisect
    from polyaccel_conformance.models.engines import Workshop

    subject = subject_of(options)
    assert subject is not None
    with Workshop() as shop:
        found = bisect(subject.open, options.family, shop)
    print("\n".join(found.lines()))
    return ExitCode.FAIL if found.whole.wrong else ExitCode.PASS
