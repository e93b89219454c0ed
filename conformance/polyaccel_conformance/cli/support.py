"""``polyaccel conformance support``."""

from __future__ import annotations

import argparse
from pathlib import Path

from polyaccel_conformance.cli.report import write

HELP = "the support page of the documentation, from certificates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", type=Path, nargs="*", metavar="FILE.tar.xz")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write it there (default: print it)")


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.certificate.bundle import read_bundle
    from polyaccel_conformance.report.support import support

    text = support([read_bundle(path) for path in options.bundles])
    if options.out is None:
        print(text, end="")
    else:
        write(options.out, text)
    return 0
