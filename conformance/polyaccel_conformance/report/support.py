"""The support table of the documentation, from certificates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyaccel.backend.levels import LEVELS
from polyaccel_conformance.certificate.bundle import SUMMARY, Bundle
from polyaccel_conformance.certificate.environment import YES
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.report.markdown import table

HEAD = """# Support

Written by `polyaccel conformance support docs/certificates/*`; not to be edited. A row is one certificate, a column one
level: `yes`, `restricted` (the cells are named below), `-` for not granted, `not exercised` where the machine lacked
the hardware, `not claimed` where the backend says that it lacks it.
"""
WORDS = {"granted": "yes", "not granted": "-"}


def support(bundles: Sequence[Bundle]) -> str:
    """The page.

    Raises:
        UsageError: a bundle is a report and no certificate.
    """
    rows: list[list[str]] = []
    details: list[str] = []
    for bundle in sorted(bundles, key=lambda b: b.path.name):
        summary: dict[str, Any] = bundle.json(SUMMARY)
        if summary.get("kind") != "certificate":
            raise UsageError(f"{bundle.path} is a {summary.get('kind')}, no certificate")
        header = summary["result"]["header"]
        environment = header["environment"]
        devices = environment.get("devices", "")
        if environment.get("simulated") == YES:
            # A row is read without its levels' titles: nobody is to take it for one of hardware.
            devices = f"simulated: {devices}"
        levels = {level["level"]: level for level in summary["levels"]}
        verdicts = [str(levels[name]["verdict"]) if name in levels else "-" for name in LEVELS]
        rows.append(
            [
                f"`{header['subject']['name']}`",
                environment.get("distribution", ""),
                devices,
                environment.get("torch", ""),
                f"{header['profile']}, {header['started'][:10]}",
                *(WORDS.get(verdict, verdict) for verdict in verdicts),
            ]
        )
        details += [f"\n## {header['subject']['name']}: {devices}\n"]
        details += [f"- {level['title']}: {level['verdict']}{_why(level)}" for level in summary["levels"]]
        details += [f"- waived: `{waiver['test']}`, {waiver['reason']}" for waiver in summary["waivers"]]
    columns = [f"{level.name} {level.title}" for level in LEVELS.values()]
    head = ["backend", "distribution", "devices", "torch", "profile, day", *columns]
    if not rows:
        return f"{HEAD}\nThere is no certificate yet.\n"
    return "\n".join([HEAD, *table(head, rows), *details, ""])


def _why(level: dict[str, Any]) -> str:
    return f" ({'; '.join(level['reasons'])})" if level["reasons"] else ""
