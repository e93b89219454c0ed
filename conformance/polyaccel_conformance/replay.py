"""A case file run again, in a worker: what crashed may crash again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.casefile import CaseFile, Replay, judge
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.profiles import PROFILES, Profile
from polyaccel_conformance.runner import lost_result
from polyaccel_conformance.workers.pool import Answer, Job, Pool
from polyaccel_conformance.workers.process import ForkServer

Archive = dict[str, npt.NDArray[np.generic]]


def replay(
    file: CaseFile,
    *,
    every_check: bool = False,
    profile: Profile = PROFILES["default"],
    server: ForkServer | None = None,
) -> Replay:
    """Run the case on the file's subject.

    Raises:
        UsageError: the operator or check is not known here, or the subject cannot be opened.
    """
    from polyaccel_conformance.checks.registry import CHECKS
    from polyaccel_conformance.problems.registry import PROBLEM_SETS

    operator, check = file.case.operator, file.failure.check
    if file.case.ranks > 1:
        return judge(file, _on_ranks(file, tuple(CHECKS), profile))
    if operator not in PROBLEM_SETS:
        raise UsageError(f"the case is of operator {operator!r}, which has no cases here")
    # What failed outside of any check, such as a crash, may have needed all of them.
    checks = [check] if check in CHECKS and not every_check else list(CHECKS)
    request = {"do": "case", "case": file.case.to_json(), "checks": checks}
    with Pool(file.subject, count=1, server=server) as pool:
        answer = pool.ask(Job(name="replay", request=request, seconds=profile.timeout))
    return judge(file, _result(file, answer))


def dump_case(file: CaseFile, server: ForkServer | None = None) -> Archive:
    """The arrays of the case on the file's subject; without outputs if it does not survive.

    Raises:
        UsageError: a case of several ranks.
    """
    if file.case.ranks > 1:
        raise UsageError("--dump and --standalone are for cases of one rank")
    with tempfile.TemporaryDirectory() as folder, Pool(file.subject, count=1, server=server) as pool:
        path = Path(folder) / "case.npz"
        request = {"do": "dump", "case": file.case.to_json(), "path": str(path), "run": True}
        answer = pool.ask(Job(name="dump", request=request, seconds=PROFILES["default"].timeout))
        if answer.died:
            answer = pool.ask(Job(name="dump", request={**request, "run": False}, seconds=PROFILES["default"].timeout))
        if "error" in answer.reply or answer.died:
            raise UsageError(f"the case cannot be written: {answer.died or answer.reply['error']['message']}")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def _result(file: CaseFile, answer: Answer) -> CaseResult:
    from polyaccel_conformance.results import result_from_json

    return result_from_json(answer.reply["result"]) if "result" in answer.reply else lost_result(answer, file.case)


def _on_ranks(file: CaseFile, checks: tuple[str, ...], profile: Profile) -> CaseResult:
    from polyaccel_conformance.multi.ranks import RankPool

    with RankPool(file.subject, file.case.ranks, checks=checks, case_timeout=profile.timeout) as pool:
        return pool.run(file.case)
