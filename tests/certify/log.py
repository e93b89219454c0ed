"""The log of a certification, as a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel.backend import load
from polyaccel_conformance.certificate.environment import environment
from tests.certify.state import State

HEAD = """# Certification log

Written by `tox -e certify`; not to be edited. Every backend gets the profile `default` and a certificate, which is
verified with a sample of its cases executed again. The seeds are fresh: each runs the cases that the profile draws
under it (the fixed lists, which no seed changes, ran with the certificate). The suite's own tests include the long
ones.
"""


def page(state: State, names: Sequence[str]) -> str:
    """One row a stage, in order; those that have not been run say so."""
    here = environment("cpu", load("cpu"))
    lines = [HEAD, f"- Python {here['python']}, torch {here['torch']}, {here['processor']}"]
    lines += [f"- contract {here['contract']}, core `{here['source.core']}`, suite `{here['source.suite']}`", ""]
    lines += ["| stage | result | seconds | what it came to |", "|---|---|---|---|"]
    for name in names:
        found = state.outcomes.get(name)
        if found is None:
            lines.append(f"| {name} | not run | | |")
        else:
            lines.append(f"| {name} | {found.verdict} | {found.seconds:.0f} | {found.figures.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
