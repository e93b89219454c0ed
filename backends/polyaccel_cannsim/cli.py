"""The command ``polyaccel-cannsim``: run a program on simulated cards, and say what is simulated."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from .errors import CannsimError
from .process import child_environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Ends with the program's own status; 2 for a wrong command line or machine."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            return _run(options)
        return _show(options)
    except CannsimError as problem:
        print(f"polyaccel-cannsim: {problem}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polyaccel-cannsim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a program, whose Python processes all see simulated cards")
    run.add_argument("--devices", help="number of cards")
    run.add_argument("--soc", help="910B, A3, 310P or a SoC name")
    run.add_argument("--cann", help="CANN version, such as 8.3.RC1")
    run.add_argument("--memory", help="bytes a card has, with K, M or G")
    run.add_argument("--ledger", help="each process writes its aclnn calls to this path with its number behind")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="-- program ...")
    commands.add_parser(
        "show", help="the machine that the environment describes, and what is exported for its CANN version"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    from .settings import Settings

    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        print(
            "polyaccel-cannsim run: a program is missing, as in: polyaccel-cannsim run -- python program.py",
            file=sys.stderr,
        )
        return 2
    environment = dict(os.environ)
    for name in ("devices", "soc", "cann", "memory", "ledger"):
        value = getattr(options, name)
        if value is not None:
            environment[f"CANNSIM_{name.upper()}"] = os.path.abspath(value) if name == "ledger" else value
    Settings.from_environment(environment)  # a wrong value is told here, not by every process
    environment |= child_environment(environment)
    found = shutil.which(program[0], path=environment.get("PATH"))
    if found is None:
        print(f"polyaccel-cannsim run: no program {program[0]}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execvpe(found, program, environment)


def _show(options: argparse.Namespace) -> int:
    del options
    from .process import all_rules
    from .registry import exported
    from .settings import Settings

    settings = Settings.from_environment()
    rules = exported(all_rules(settings.rules), settings.cann)
    print(f"{settings.devices} x {settings.soc.name}, CANN {settings.cann}, {settings.memory} bytes each")
    for name, rule in sorted(rules.items()):
        print(f"{name}({', '.join(rule.signature)})  since {rule.since}: {rule.source}")
    return 0
