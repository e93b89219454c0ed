"""Options that several commands share: what is tested."""

from __future__ import annotations

import argparse
from pathlib import Path

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.subject import BATCH_INVARIANT, Subject


def add_subject_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    what = parser.add_mutually_exclusive_group(required=required)
    what.add_argument("--backend", metavar="NAME", help="an installed backend")
    what.add_argument(
        "--table",
        metavar="FILE.py:NAME",
        help="a mapping of operators to callables, a Backend, or a function that returns one; needs no distribution",
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="torch device of a table (default: cpu)")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="have the backend promise it, and hold it to that"
    )
    parser.add_argument("--mutant", default="", help=argparse.SUPPRESS)


def subject_of(options: argparse.Namespace) -> Subject | None:
    """What the options name, None if they name nothing.

    Raises:
        UsageError: ``--table`` is not of the form FILE.py:NAME, or is to promise something.
    """
    if options.backend is not None:
        promise = BATCH_INVARIANT if options.batch_invariant else ""
        return Subject(kind="backend", name=options.backend, mutant=options.mutant, promise=promise)
    if options.table is None:
        return None
    if options.batch_invariant:
        raise UsageError("--batch-invariant is a backend's promise; a table has none to make")
    path, colon, name = options.table.rpartition(":")
    if not colon or not path or not name:
        raise UsageError(f"--table {options.table!r} is not of the form FILE.py:NAME")
    # Absolute, since a case file may be replayed from elsewhere.
    return Subject(
        kind="table", name=name, path=str(Path(path).resolve()), device=options.device, mutant=options.mutant
    )


def names(text: str | None) -> tuple[str, ...]:
    """``a,b`` as a tuple; nothing for None."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
