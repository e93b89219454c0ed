"""Executing a sample of a bundle's cases again: in workers, since what passed elsewhere may crash here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.errors import ConformanceError, UsageError
from polyaccel_conformance.log import Logged
from polyaccel_conformance.profiles import profile_of
from polyaccel_conformance.results import result_from_json
from polyaccel_conformance.workers.pool import Job, Pool
from polyaccel_conformance.workers.process import ForkServer

PATIENCE = 4
"""A case may take so many times the profile's time: this machine may be the slower one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """What executing again showed.

    Attributes:
        done: cases that were executed.
        differences: sentences about cases whose verdict is another one.
        other_bits: cases with the same verdict and other output bits.
        left: sentences about cases that could not be executed.
    """

    done: int = 0
    differences: tuple[str, ...] = ()
    other_bits: int = 0
    left: tuple[str, ...] = ()


def sample(results: Sequence[CaseResult], count: int) -> list[CaseResult]:
    """``count`` cases, as evenly over the operators and numbers of ranks as they allow; always the same for a log."""
    queues: dict[tuple[str, int], list[CaseResult]] = {}
    for result in sorted(results, key=lambda r: hashlib.sha256(r.case.key.encode()).digest()):
        queues.setdefault((result.case.operator, result.case.ranks), []).append(result)
    chosen: list[CaseResult] = []
    while queues and len(chosen) < count:
        for name in sorted(queues):
            if len(chosen) < count:
                chosen.append(queues[name].pop())
            if not queues[name]:
                del queues[name]
    return chosen


def rerun(logged: Logged, results: Sequence[CaseResult], count: int) -> Rerun:
    """Execute ``count`` of the cases on this machine.

    Raises:
        UsageError: the backend cannot be opened here.
    """
    chosen = sample(results, count)
    differences: list[str] = []
    left: list[str] = []
    done = other_bits = 0
    for before, now in _executed(logged, chosen):
        name = f"case {before.case.key} of {before.case.operator}"
        if isinstance(now, str):
            left.append(f"{name}: {now}")
            continue
        done += 1
        if now.passed != before.passed:
            why = f" ({now.failures[0].check}: {now.failures[0].cause})" if now.failures else ""
            differences.append(f"{name} {_said(now)}{why}, it {_said(before)} before")
        elif now.observed != before.observed:
            other_bits += 1
    if len(chosen) < count:
        left.append(f"the log has {len(chosen)} cases, {count} were asked for")
    return Rerun(done=done, differences=tuple(differences), other_bits=other_bits, left=tuple(left))


def _said(result: CaseResult) -> str:
    return "passed" if result.passed else "failed"


def _executed(logged: Logged, chosen: Sequence[CaseResult]) -> Iterator[tuple[CaseResult, CaseResult | str]]:
    from polyaccel_conformance.multi.ranks import RankPool
    from polyaccel_conformance.runner import lost_result

    subject, seconds = logged.header.subject, PATIENCE * profile_of(logged.header.profile).timeout
    with ExitStack() as stack:
        server = ForkServer()
        stack.callback(server.close)
        pool = stack.enter_context(Pool(subject, count=1, server=server))
        devices = int(pool.start()["devices"])
        on_one = [result for result in chosen if result.case.ranks == 1]
        jobs = [Job(name=result, request=_request(result), seconds=seconds) for result in on_one]
        for answer in pool.run(jobs):
            before = answer.job.name
            assert isinstance(before, CaseResult)
            reply = answer.reply.get("result")
            yield before, lost_result(answer, before.case) if reply is None else result_from_json(reply)
        for ranks in sorted({result.case.ranks for result in chosen} - {1}):
            of_ranks = [result for result in chosen if result.case.ranks == ranks]
            if ranks > devices > 1:
                yield from ((result, f"it needs {ranks} devices, there are {devices}") for result in of_ranks)
                continue
            with RankPool(subject, ranks, server=server, case_timeout=seconds) as together:
                for result in of_ranks:
                    try:
                        yield result, together.run(result.case, result.checks)
                    except UsageError:
                        raise
                    except ConformanceError as error:
                        yield result, f"{ranks} ranks did not start: {error}"


def _request(result: CaseResult) -> dict[str, object]:
    return {"do": "case", "case": result.case.to_json(), "checks": list(result.checks)}
