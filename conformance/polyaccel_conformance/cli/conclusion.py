"""Before a run: the preflight. After it: the levels, what waivers did, the bundle, and the exit code."""

from __future__ import annotations

from pathlib import Path

from polyaccel_conformance.certificate.bundle import exit_code, write_bundle
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.log import read_log
from polyaccel_conformance.preflight.run import preflight
from polyaccel_conformance.report.terminal import levels
from polyaccel_conformance.results import RunResult
from polyaccel_conformance.runner import RESULTS
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.waivers import read_waivers


def ready(subject: Subject) -> bool:
    """The first stage of every run: prints what the preflight found, and says whether running makes sense.

    A subject that cannot be opened is for the run to name.
    """
    if subject.mutant:
        return True
    # What composites need is a question of levels, which a table never earns.
    found = preflight(subject, examine=None if subject.kind == "backend" else False)
    if not found.opened:
        return True
    print(f"preflight passed in {found.seconds:.1f} s\n" if found.passed else found.text(), end="")
    return found.usable


def conclude(
    result: RunResult, folder: Path, waivers: Path | None, require_native: bool, bundle: Path | None
) -> ExitCode:
    """Print what the run earned; the exit code with waivers counted.

    Raises:
        UsageError: the waivers or the bundle's place.
    """
    log = folder / RESULTS
    known = read_waivers(waivers) if waivers is not None else ()
    report = recount(read_log(log), known, require_native=require_native)
    if report.levels and not result.header.selection:
        print("\n".join(levels(report)))
    for problem in report.applied.problems:
        print(f"FAILED {problem}")
    if report.applied.covered:
        print(f"{len(report.applied.covered)} of {report.applied.failures} failures are waived")
    if bundle is not None:
        kind = write_bundle(bundle, log, known, require_native=require_native)
        print(f"wrote {bundle}: a {kind}")
    if result.device_lost or (not known and not require_native):
        return result.exit_code
    code = exit_code(report)
    return ExitCode.INCONCLUSIVE if code is ExitCode.PASS and result.incomplete else code
