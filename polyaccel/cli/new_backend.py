"""``polyaccel new-backend NAME --device TYPE``: the package of a new backend, ready to install and to test."""

from __future__ import annotations

import argparse
from pathlib import Path

from polyaccel.cli.options import Commands, UsageError


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("new-backend", help="write the package of a new backend, on composites at first")
    parser.add_argument("name", help="of the backend, as in backend=NAME")
    parser.add_argument("--device", required=True, metavar="TYPE", help="torch's device type, such as cuda or npu")
    parser.add_argument("--folder", type=Path, metavar="PATH", help="a new folder (default: polyaccel-NAME)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.errors import UsageError as Refused
    from polyaccel_conformance.template.write import write_package

    folder = options.folder or Path(f"polyaccel-{options.name}")
    try:
        written = write_package(options.name, options.device, folder)
    except Refused as error:
        raise UsageError(str(error)) from error
    print("wrote", *written, sep="\n  ")
    print(f"next: cd {folder} && python -m pip install -e '.[test]' && pytest")
    return 0
