"""``polyaccel conformance numerics``."""

from __future__ import annotations

import argparse
from pathlib import Path

from polyaccel_conformance.cli.report import log_of, write
from polyaccel_conformance.errors import UsageError

HELP = "a page that sets several runs side by side, such as one for each setting of a library"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="a run, and what the page calls it")
    parser.add_argument("--title", default="Measured numerics", help="of the page")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write it there (default: print it)")


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.certificate.recount import recount
    from polyaccel_conformance.log import read_log
    from polyaccel_conformance.report.numerics import Setting, numerics

    settings = []
    for text in options.runs:
        name, equals, folder = text.rpartition("=")
        if not equals or not name or not folder:
            raise UsageError(f"{text!r} is not of the form NAME=FOLDER")
        settings.append(Setting(name=name, report=recount(read_log(log_of(Path(folder))))))
    text = numerics(options.title, settings)
    if options.out is None:
        print(text, end="")
    else:
        write(options.out, text)
        print(f"wrote {options.out}")
    return 0
