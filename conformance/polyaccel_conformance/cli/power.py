"""After a run that certifies: ten bugs are planted around the backend's own operators, and each must be found."""

from __future__ import annotations

import datetime
from contextlib import closing
from functools import partial
from pathlib import Path

from polyaccel_conformance.log import ResultsLog
from polyaccel_conformance.results import RunResult
from polyaccel_conformance.runner import RESULTS

CERTIFY = "certify"


def asked(result: RunResult) -> bool:
    """Whether the run is one that certifies, and came to its end."""
    ended = not result.incomplete and not result.device_lost
    return result.header.profile == CERTIFY and result.header.complete and ended and not result.header.subject.mutant


def shown(result: RunResult, folder: Path) -> bool:
    """Plant them, print what became of them and append it to the log; whether all were found."""
    from polyaccel_conformance.mutants.series import around
    from polyaccel_conformance.workers.process import ForkServer

    # Which ten is decided by the day on which the run was begun.
    date = datetime.date.fromisoformat(result.header.started[:10])
    with closing(ForkServer()) as server:
        outcome = around(result.header.subject, date, server, partial(print, flush=True))
    with ResultsLog(folder / RESULTS, resume=True) as log:
        for score in outcome.scores:
            found = score.mutant not in outcome.missed
            log.write("mutant", {"mutant": score.mutant, "found": found, "cases": score.cases})
    for name in outcome.missed:
        print(f"FAILED {name} survives around {result.header.subject.label}")
    print(f"around {result.header.subject.label}: {outcome.summary}")
    return not outcome.missed
