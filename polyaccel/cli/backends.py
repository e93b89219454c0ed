"""``polyaccel backends``: a PASS or FAIL row a backend, with the reason."""

from __future__ import annotations

import argparse
import dataclasses
import json

from polyaccel.backend.registry import list_backends
from polyaccel.cli.options import Commands


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("backends", help="which backends are installed, and which can be used here")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    statuses = list_backends()
    if options.json:
        print(json.dumps([dataclasses.asdict(status) for status in statuses], indent=2))
        return 0
    width = max((len(status.name) for status in statuses), default=0)
    for status in statuses:
        verdict = "PASS" if status.usable else "FAIL"
        devices = f" [{', '.join(status.devices)}]" if status.devices else ""
        reason = f"  {status.reason}" if status.reason else ""
        print(f"{verdict}  {status.name:<{width}}  {status.origin}{devices}{reason}")
    return 0
