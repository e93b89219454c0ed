"""Collectives in more than one call or group, and with a rank that stays away or fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from polyaccel.backend import CommunicationError, Communicator, PolyaccelError
from polyaccel_conformance.bench import Bench, call_by_name
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.checks.comm import ALL_REDUCE, RankCheck, control_case, ranked
from polyaccel_conformance.compare import compare
from polyaccel_conformance.formats import format_of, from_torch
from polyaccel_conformance.multi.bench import Call, RankBench, rank_bench
from polyaccel_conformance.multi.problem import Ints, RankedProblem, digits
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, finish
from polyaccel_conformance.problems.collectives import CALLS
from polyaccel_conformance.trial import Trial

SLACK = 10.0
"""Seconds beyond a collective's timeout after which its error came too late: scheduling on a busy host."""


class _Scenario(RankCheck):
    """A question of the cases of one scenario of ``all_reduce``."""

    scenario: str

    def concerns(self, case: Case, problem: RankedProblem) -> bool:
        return case.operator == "all_reduce" and case.structure.get("scenario") == self.scenario

    def example(self, bench: RankBench) -> RankedProblem:
        return control_case(bench, "all_reduce", {**ALL_REDUCE, "structure.scenario": self.scenario})

    def differs(self, wanted: Ints, got: torch.Tensor, dtype: str, what: str) -> Failure | None:
        expected = finish(Bounded.exact(wanted), format_of(dtype), exact=True)
        found = compare(expected, from_torch(got), got.dtype)
        return None if found is None else self.fail(found.cause, f"{what}: {found.message}")


class _Caller:
    """The planned ``all_reduce``, called on tensors and communicators of one's choice."""

    def __init__(self, bench: RankBench, problem: RankedProblem) -> None:
        self._bench, self._problem = bench, problem
        self._call = bench.resolve(problem.case.operator, problem.place(bench)).call

    def upload(self, values: Ints) -> torch.Tensor:
        return self._bench.upload(Operand.rounded(values, self._problem.case.dtype).torch())

    def __call__(self, x: torch.Tensor, comm: Communicator) -> object:
        return call_by_name(self._call, ("x", "comm"), {"x": x, "comm": comm})


def _contributions(problem: RankedProblem, name: str, reserve: int) -> list[Ints]:
    shape = (problem.case.dim("rows"), problem.case.dim("width"))
    return [digits(problem, name, shape, rank, reserve) for rank in range(problem.world_size)]


def _reserve(problem: RankedProblem) -> int:
    return (CALLS - 1) * int(np.ceil(np.log2(problem.world_size)))


class BackToBack(_Scenario):
    """Sums on one buffer, back to back: each takes what the one before it left."""

    name = "comm.back_to_back"
    scenario = "back_to_back"

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        parts = _contributions(problem, "x", _reserve(problem))
        call = _Caller(bench, problem)
        x = call.upload(parts[bench.rank])
        for _ in range(CALLS):
            call(x, bench.comm)
        bench.synchronize()
        wanted = sum(parts) * problem.world_size ** (CALLS - 1)
        return self.differs(np.asarray(wanted), x, problem.case.dtype, f"after {CALLS} sums on one buffer")

    def control(self, bench: Bench) -> Control:
        ranks = rank_bench(bench)
        return self.judged(ranks.spoiled(_stale(ranks)), self.example(ranks))


class Interleaved(_Scenario):
    """Two communicators of the same ranks, used in turn, do not mix."""

    name = "comm.interleaved"
    scenario = "interleaved"

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        other = bench.group(range(problem.world_size))
        assert other is not None
        try:
            reserve = _reserve(problem)
            first, second = (_contributions(problem, name, reserve) for name in ("first", "second"))
            call = _Caller(bench, problem)
            x, y = call.upload(first[bench.rank]), call.upload(second[bench.rank])
            for _ in range(2):
                call(x, bench.comm)
                call(y, other)
            bench.synchronize()
            world, dtype = problem.world_size, problem.case.dtype
            wrong = self.differs(np.asarray(sum(first) * world), x, dtype, "on the first communicator")
            return wrong or self.differs(np.asarray(sum(second) * world), y, dtype, "on the second communicator")
        finally:
            other.close()

    def control(self, bench: Bench) -> Control:
        ranks = rank_bench(bench)
        return self.judged(ranks.spoiled(_stale(ranks)), self.example(ranks))


class Subgroups(_Scenario):
    """A group of some of the ranks sums over these and nobody else."""

    name = "comm.subgroups"
    scenario = "subgroups"

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        parts = _contributions(problem, "x", 0)
        call = _Caller(bench, problem)
        world = problem.world_size
        wrong: Failure | None = None
        for partition in _partitions(world):
            own: Communicator | None = None
            for members in partition:
                own = bench.group(members) or own
            assert own is not None
            (members,) = [members for members in partition if bench.rank in members]
            try:
                x = call.upload(parts[bench.rank])
                call(x, own)
                bench.synchronize()
            finally:
                own.close()
            wanted = np.asarray(sum(parts[member] for member in members))
            # Every rank goes through all partitions, whatever it finds, or the others would wait for it.
            wrong = wrong or self.differs(wanted, x, problem.case.dtype, f"in the group of ranks {list(members)}")
        return wrong

    def control(self, bench: Bench) -> Control:
        ranks = rank_bench(bench)

        def everybody(call: Call) -> Call:
            return lambda x, comm: call(x, ranks.comm)

        return self.judged(ranks.spoiled(everybody), self.example(ranks))


def _partitions(world: int) -> list[list[Sequence[int]]]:
    """Neighbours together, then every other rank, so that no numbering of groups is right by chance."""
    half = (world + 1) // 2
    return [[range(half), range(half, world)], [range(0, world, 2), range(1, world, 2)]]


def _stale(bench: RankBench) -> Callable[[Call], Call]:
    """The first result again and again."""
    kept: list[torch.Tensor] = []

    def spoil(call: Call) -> Call:
        def wrong(x: torch.Tensor, comm: Communicator) -> object:
            result = call(x, comm)
            # What is kept must have been computed.
            bench.synchronize()
            if kept:
                x.copy_(kept[0])
                bench.synchronize()
            else:
                kept.append(x.clone())
            return result

        return wrong

    return spoil


class _ExpectedFailure(_Scenario):
    """One rank does not take part; the others must learn of it by a typed error, in time."""

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        absent = problem.case.seed % problem.world_size
        group = bench.group(range(problem.world_size), bench.withheld)
        assert group is not None
        call = _Caller(bench, problem)
        x = call.upload(_contributions(problem, "x", 0)[bench.rank])
        bench.control.gather(f"{self.name}: begin")
        begun = time.monotonic()
        try:
            if bench.rank == absent:
                found = self.stay_away(bench, group)
                # Until the others have given up, this rank is alive and its connections are open.
                bench.control.gather(self.name)
                return found
            error: Exception | None = None
            try:
                call(x, group)
                bench.synchronize()
            except PolyaccelError as raised:
                error = raised
            waited = time.monotonic() - begun
            bench.control.gather(self.name)
            return self._judge(error, waited, bench.withheld, absent)
        finally:
            group.close()

    def stay_away(self, bench: RankBench, group: Communicator) -> Failure | None:
        """What the one rank does instead of the collective."""
        return None

    def _judge(self, error: Exception | None, waited: float, timeout: float, absent: int) -> Failure | None:
        if error is None:
            return self.fail("no error", f"rank {absent} took no part, and the call returned")
        if not _from_communication(error):
            return self.fail("other error", f"rank {absent} took no part: {type(error).__name__}: {error}")
        if waited > timeout + SLACK:
            return self.fail("late error", f"the error came after {waited:.1f} s, the timeout is {timeout:g} s")
        return None

    def control(self, bench: Bench) -> Control:
        """A call that returns whatever the others do."""
        ranks = rank_bench(bench)
        problem = self.example(ranks)
        found = self.run(Trial(ranks.spoiled(_returning), problem))
        if ranks.rank == problem.case.seed % ranks.world_size:
            return "impossible here"
        return "failed as it must" if found is not None else "did not fail"


def _returning(call: Call) -> Call:
    return lambda x, comm: x


def _from_communication(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, CommunicationError):
            return True
        error = error.__cause__
    return False


class Timeout(_ExpectedFailure):
    """One rank is withheld: the others get a CommunicationError within the timeout."""

    name = "comm.timeout"
    scenario = "withheld"


class FailureOnOneRank(_ExpectedFailure):
    """One rank fails with a typed error and leaves: the others do not hang."""

    name = "comm.failure_on_one_rank"
    scenario = "failing"

    def stay_away(self, bench: RankBench, group: Communicator) -> Failure | None:
        odd = bench.upload(torch.ones(bench.world_size + 1, 1))
        try:
            group.reduce_scatter(odd)
            bench.synchronize()
        except PolyaccelError:
            return None
        except Exception as raised:
            return self.fail("untyped error", f"{type(raised).__name__}: {raised}")
        finally:
            group.close()
        return self.fail("no error", f"reduce_scatter of {bench.world_size + 1} rows over {bench.world_size} ranks")


GROUP_CHECKS: Mapping[str, Check] = MappingProxyType(
    {c.name: c for c in (BackToBack(), Interleaved(), Subgroups(), Timeout(), FailureOnOneRank())}
)
