"""The command line of the suite. Each command is a module with ``HELP``, ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from polyaccel.backend import PolyaccelError
from polyaccel.backend.errors import BackendUnavailable, ConfigurationError
from polyaccel_conformance.errors import ExitCode, UsageError

COMMANDS = ("preflight", "run", "replay", "report", "numerics", "support", "verify", "bisect", "mutants")
PACKAGE = "polyaccel_conformance.cli"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is an :class:`ExitCode`."""
    options = build_parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except (UsageError, BackendUnavailable, ConfigurationError) as error:
        print(f"polyaccel conformance: {_one_line(error)}", file=sys.stderr)
        return ExitCode.USAGE
    except PolyaccelError as error:
        print(f"polyaccel conformance: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        return ExitCode.FAIL
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; the interpreter's exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.PASS


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, for the program, its help and its documentation test."""
    parser = argparse.ArgumentParser(
        prog="polyaccel conformance", description="Every operator of the contract, tested against float64."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _one_line(error: PolyaccelError) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
