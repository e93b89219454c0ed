"""``polyaccel conformance verify``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "check a bundle: every figure from its log, every input from its seed, and whether it is stale"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="FILE.tar.xz")
    parser.add_argument("--rerun", type=int, default=0, metavar="N", help="execute N of its cases again, here")
    parser.add_argument("--key", type=Path, metavar="PUBLIC.pem", help="the public key that must have signed it")


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.certificate.bundle import read_bundle
    from polyaccel_conformance.certificate.verify import verify

    found = verify(read_bundle(options.bundle), rerun=options.rerun, key=options.key)
    print(found.text(), end="")
    return found.exit_code
