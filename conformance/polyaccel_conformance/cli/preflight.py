"""``polyaccel conformance preflight``."""

from __future__ import annotations

import argparse
import json

from polyaccel_conformance.cli.options import add_subject_options, subject_of
from polyaccel_conformance.errors import ExitCode, UsageError

HELP = "what can be known of a backend before the first case: found, loaded, its devices' facts, what they lack"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject_options(parser)
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="devices that a run will want (default: 1)")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.preflight.run import preflight

    subject = subject_of(options)
    if subject is None:
        raise UsageError("--backend or --table is needed")
    found = preflight(subject, devices=options.devices, examine=True)
    print(json.dumps(found.to_json(), indent=2) if options.json else found.text(), end="")
    return ExitCode.PASS if found.passed else ExitCode.FAIL
