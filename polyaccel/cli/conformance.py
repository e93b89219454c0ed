"""``polyaccel conformance``: everything behind it belongs to the conformance suite, which is imported only then."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyaccel.cli.options import Commands

COMMAND = "conformance"
SUITE = "polyaccel_conformance"
NEEDED = (SUITE, "hypothesis")
INSTALL = 'pip install "polyaccel[conformance]"'
EXIT_USAGE = 2


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """For the list of commands; :func:`hand_on` takes the arguments before any parser of this program sees them."""
    commands.add_parser(COMMAND, help="test a backend against the contract", add_help=False)


def hand_on(arguments: Sequence[str]) -> int:
    """Run the suite's own command line; returns its exit code, 2 where the suite is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"polyaccel: {' and '.join(missing)} not installed; {INSTALL} brings the suite", file=sys.stderr)
        return EXIT_USAGE
    code: int = importlib.import_module(f"{SUITE}.cli").main(arguments)
    return code
