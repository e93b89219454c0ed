"""A pool of ranks: processes that persist over cases, run each together, and are replaced when one of them is lost."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, Control, Failure
from polyaccel_conformance.errors import ConformanceError, UsageError
from polyaccel_conformance.multi.control import (
    Abandon,
    Gather,
    Gathered,
    RankVerdict,
    RunCase,
    RunControl,
)
from polyaccel_conformance.multi.identity import RankIdentity
from polyaccel_conformance.multi.registry import in_lockstep, lockstep_checks
from polyaccel_conformance.multi.worker import TARGET
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.pool import HANG
from polyaccel_conformance.workers.process import ForkServer, Process, Spawn, Starter

GRACE = 0.5
"""Seconds after which ranks that another has left behind in a collective are released from it."""
CHECK = "comm.ranks"
"""Under this name failures are reported that are no check's: a rank died, hung or crashed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedResult(CaseResult):
    """A case's result together with each rank's own verdict and who the ranks were."""

    verdicts: tuple[RankVerdict, ...] = ()
    identities: tuple[RankIdentity, ...] = ()


@dataclass(slots=True)
class _Rank:
    """The parent's side of one rank."""

    process: Process
    connection: Connection
    verdict: RankVerdict | None = None
    gathered: Gather | None = None
    dead: bool = False

    @property
    def waiting(self) -> bool:
        """For the other ranks' contributions."""
        return self.gathered is not None


class RankPool(AbstractContextManager["RankPool"]):
    """``world_size`` persistent processes, each with the subject's backend, its device and its communicator.

    A rank that dies, hangs or raises ends the case with a typed failure; the other ranks are released, and the next
    case gets fresh processes.

    Args:
        checks: names of the checks to ask, of which those are that ranks ask together; default all of these.
        server: a forkserver to share, closed by its owner; else the pool has one of its own. A backend that cannot
            follow a fork gets new interpreters.
        timeout: seconds that a collective waits before it must raise; also what a rank may take to start.
        withheld: the same for collectives that are meant to fail.
        case_timeout: seconds after which a case has hung.
        hung: folder into which the case is written when a rank hangs or dies.

    Raises:
        UsageError: fewer than two ranks: a world of one is no world.
    """

    def __init__(
        self,
        subject: Subject,
        world_size: int,
        *,
        checks: Sequence[str] | None = None,
        server: ForkServer | None = None,
        timeout: float = 30.0,
        withheld: float = 2.0,
        case_timeout: float = 60.0,
        hung: Path | None = None,
    ) -> None:
        if world_size < 2:
            raise UsageError(f"a pool of {world_size} ranks; several devices are at least 2")
        self.subject = subject
        self.world_size = world_size
        self.identities: tuple[RankIdentity, ...] = ()
        self.restarts = -1
        self._checks = lockstep_checks() if checks is None else in_lockstep(checks)
        self._own = server is None
        self._server = server if server is not None else ForkServer()
        self._starter: Starter = self._server
        self._timeout, self._withheld, self._case_timeout = timeout, withheld, case_timeout
        self._hung = hung
        self._ranks: list[_Rank] = []
        self._folder: Path | None = None

    # -- cases ---------------------------------------------------------------------------------------------------------

    def run(self, case: Case, checks: Sequence[str] | None = None) -> RankedResult:
        """All ranks run the case in lock-step.

        Raises:
            UsageError: a case of another number of ranks.
            ConformanceError: the ranks could not be started; says why.
        """
        if case.ranks != self.world_size:
            raise UsageError(f"a case of {case.ranks} ranks for a pool of {self.world_size}")
        started = time.perf_counter()
        asked = self._checks if checks is None else in_lockstep(checks)
        verdicts = self._order(RunCase(case=case.to_json(), checks=asked), self._case_timeout)
        result = _merge(case, verdicts, self.identities, time.perf_counter() - started)
        if self._hung is not None and any(v.ending in ("crashed",) or v.broken for v in verdicts):
            self._hung.mkdir(parents=True, exist_ok=True)
            (self._hung / f"{case.key}.json").write_text(json.dumps(case.to_json(), indent=1))
        return result

    def control(self, check: str) -> Control:
        """The check's control, asked by all ranks together: as it must where it failed on at least one of them, since
        that fails a case."""
        verdicts = self._order(RunControl(check), self._case_timeout)
        found = [verdict.control for verdict in verdicts]
        if any(verdict.ending == "crashed" for verdict in verdicts):
            return "did not fail"
        if "failed as it must" in found:
            return "failed as it must"
        return "impossible here" if all(control == "impossible here" for control in found) else "did not fail"

    # -- processes -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the ranks now rather than with the first case.

        Raises:
            ConformanceError: a rank could not open the backend or join; says which and why.
        """
        self._stop()
        self.restarts += 1
        self._launch()
        if any(not identity.fork_safe for identity in self.identities) and self._starter is self._server:
            self._stop()
            self._starter = Spawn()
            self._launch()

    def _launch(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="polyaccel-ranks-"))
        for rank in range(self.world_size):
            arguments = {
                "subject": self.subject.to_json(),
                "rank": rank,
                "world_size": self.world_size,
                "folder": str(self._folder),
                "timeout": self._timeout,
                "withheld": self._withheld,
            }
            process, connection = self._starter.start(TARGET, arguments, str(self._folder / f"rank-{rank}.log"))
            self._ranks.append(_Rank(process=process, connection=connection))
        identities, refusals = self._greet(time.monotonic() + 2 * self._timeout)
        if refusals:
            self._stop()
            raise ConformanceError("ranks did not start: " + "; ".join(refusals))
        self.identities = tuple(identities)

    def close(self) -> None:
        """End all processes. Idempotent."""
        self._stop()
        if self._own:
            self._server.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _greet(self, deadline: float) -> tuple[list[RankIdentity], list[str]]:
        """Who the ranks are, and why others are not there. Nobody is waited for long once one has refused."""
        identities: dict[int, RankIdentity] = {}
        refusals: list[str] = []
        numbers = {rank.connection: number for number, rank in enumerate(self._ranks)}
        while numbers and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(numbers), left):
                assert isinstance(connection, Connection)
                number = numbers.pop(connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    code = self._ranks[number].process.wait(1.0)
                    refusals.append(f"rank {number}: the process {_exit(code)}")
                    continue
                if isinstance(message, RankIdentity):
                    identities[number] = message
                else:
                    refusals.append(f"rank {number}: {message.text}")
            if refusals:
                deadline = min(deadline, time.monotonic() + GRACE)
        if not refusals:
            refusals = [f"rank {number} did not answer" for number in numbers.values()]
        return [identities[number] for number in sorted(identities)], refusals

    def _stop(self) -> None:
        for rank in self._ranks:
            rank.connection.close()
        deadline = time.monotonic() + 1.0
        for rank in self._ranks:
            if rank.process.wait(max(deadline - time.monotonic(), 0.01)) is None:
                rank.process.kill()
                rank.process.wait(5.0)
        self._ranks = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # -- lock-step -----------------------------------------------------------------------------------------------------

    def _order(self, order: object, limit: float) -> list[RankVerdict]:
        """Send an order to all ranks and answer them until each has a verdict."""
        if not self._ranks:
            self.start()
        for rank in self._ranks:
            rank.verdict, rank.gathered, rank.dead = None, None, False
            with suppress(OSError):
                rank.connection.send(order)
        verdicts = self._collect(time.monotonic() + limit)
        if any(verdict.broken for verdict in verdicts):
            # The communicator, or a process, is of no more use; the next order gets fresh ones.
            self._stop()
        return verdicts

    def _collect(self, deadline: float) -> list[RankVerdict]:
        ranks = self._ranks
        behind: float | None = None
        while any(rank.verdict is None and not rank.dead for rank in ranks):
            self._answer()
            left = [rank for rank in ranks if rank.verdict is None and not rank.dead]
            if not left:
                break
            now = time.monotonic()
            if now >= deadline:
                break
            ended = [rank for rank in ranks if rank not in left]
            behind = (now if behind is None else behind) if ended else None
            late = behind is not None and now - behind > GRACE
            if late and any(_alive(rank) for rank in ended) and any(_diverged(rank) for rank in ended):
                # They wait in a collective for ranks that are done with the case: a closed connection frees them.
                _release(ended)
            self._listen(left, min(deadline - now, 0.05 if ended else 1.0))
        return [self._verdict(rank, number) for number, rank in enumerate(ranks)]

    def _answer(self) -> None:
        """Hand out what was gathered once all have contributed, or say that not all will."""
        asking = [rank.gathered for rank in self._ranks if rank.gathered is not None]
        if not asking:
            return
        if len(asking) == len(self._ranks) and len({gather.topic for gather in asking}) == 1:
            answer: object = Gathered(tuple(gather.value for gather in asking))
        elif len(asking) == len(self._ranks) or any(rank.verdict is not None or rank.dead for rank in self._ranks):
            answer = Abandon()
        else:
            return
        for rank in self._ranks:
            if rank.gathered is not None:
                rank.gathered = None
                with suppress(OSError):
                    rank.connection.send(answer)

    def _listen(self, left: list[_Rank], seconds: float) -> None:
        by_connection = {rank.connection: rank for rank in left}
        for connection in wait(list(by_connection), seconds):
            assert isinstance(connection, Connection)
            rank = by_connection[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):
                rank.dead = True
                continue
            if isinstance(message, Gather):
                rank.gathered = message
            else:
                rank.verdict = message

    def _verdict(self, rank: _Rank, number: int) -> RankVerdict:
        if rank.verdict is not None:
            return rank.verdict if not rank.dead else replace(rank.verdict, broken=True)
        if rank.dead:
            return RankVerdict(ending="crashed", text=f"the process {_exit(rank.process.wait(1.0))}", broken=True)
        rank.process.kill()
        if rank.waiting:
            return RankVerdict(ending="abandoned", text="it waited for the other ranks", broken=True)
        return RankVerdict(ending="crashed", text=f"no answer within {self._case_timeout:g} s", broken=True)


def _alive(rank: _Rank) -> bool:
    return not rank.dead


def _diverged(rank: _Rank) -> bool:
    """Whether a rank left the case in a way that the others may not have followed."""
    verdict = rank.verdict
    return rank.dead or verdict is None or verdict.broken or verdict.result is None or not verdict.result.passed


def _release(ended: list[_Rank]) -> None:
    for rank in ended:
        if _alive(rank):
            rank.process.kill()
        rank.dead = True


def _exit(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


# -- one result of many ------------------------------------------------------------------------------------------------


def _merge(
    case: Case, verdicts: list[RankVerdict], identities: tuple[RankIdentity, ...], seconds: float
) -> RankedResult:
    """The ranks' results as one: a failure that several ranks share is reported once and names them all."""
    parts = {rank: v.result for rank, v in enumerate(verdicts) if v.result is not None}
    first = next(iter(parts.values()), None)
    headroom: dict[str, float] = {}
    for result in parts.values():
        for name, share in result.headroom.items():
            headroom[name] = max(headroom.get(name, 0.0), share)
    return RankedResult(
        case=case,
        failures=_failures(verdicts),
        checks=() if first is None else tuple(dict.fromkeys(c for r in parts.values() for c in r.checks)),
        implementation="" if first is None else first.implementation,
        kind="" if first is None else first.kind,
        headroom=headroom,
        digests={f"{name}@{r}": digest for r, part in parts.items() for name, digest in part.digests.items()},
        observed=" ".join(part.observed for part in parts.values()),
        seconds=seconds,
        verdicts=tuple(verdicts),
        identities=identities,
        notes=tuple(dict.fromkeys(note for part in parts.values() for note in part.notes)),
    )


def _failures(verdicts: list[RankVerdict]) -> tuple[Failure, ...]:
    found: dict[tuple[str, str, str], tuple[Failure, list[int]]] = {}
    followed: dict[tuple[str, str, str], tuple[Failure, list[int]]] = {}
    for rank, verdict in enumerate(verdicts):
        own = () if verdict.result is None else verdict.result.failures
        if verdict.ending == "crashed":
            cause = HANG if verdict.text.startswith("no answer") else "rank lost"
            own = (*own, Failure(check=CHECK, cause=cause, message=verdict.text))
        for failure in own:
            # What a rank meets because another one left is no finding of its own.
            consequence = failure.cause == "error" and failure.message.startswith(("Abandoned", "CommunicationError"))
            key = (failure.check if not consequence else "", failure.cause, failure.output)
            (followed if consequence else found).setdefault(key, (failure, []))[1].append(rank)
    chosen = found or followed
    return tuple(
        replace(failure, message=f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)}: {failure.message}")
        for failure, ranks in chosen.values()
    )


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
