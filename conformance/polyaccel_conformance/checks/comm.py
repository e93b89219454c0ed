"""Whether ranks agree, send what they should and no more, and hold no more than their share."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from types import MappingProxyType

import torch

from polyaccel.backend import Collective
from polyaccel_conformance.bench import Bench, call_by_name
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.compare import compare
from polyaccel_conformance.multi.bench import Call, RankBench, rank_bench
from polyaccel_conformance.multi.problem import RankedProblem, Shares, Traced
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Observation, Trial


def ranked(problem: Problem) -> RankedProblem:
    """The problem as one of several ranks.

    Raises:
        TypeError: it is not one.
    """
    if not isinstance(problem, RankedProblem):
        raise TypeError(f"{type(problem).__name__} is no problem of several ranks")
    return problem


class RankCheck(Check):
    """A question of cases with several ranks. Ranks ask it together: a rank that meets an error raises it before
    any exchange, and then takes no further part."""

    def applies(self, case: Case, problem: Problem) -> bool:
        return case.ranks > 1 and isinstance(problem, RankedProblem) and self.concerns(case, problem)

    def concerns(self, case: Case, problem: RankedProblem) -> bool:
        """Whether it has a meaning for a case of several ranks."""
        return True

    def fail(self, cause: str, message: str, output: str = "") -> Failure:
        return Failure(check=self.name, cause=cause, message=message, output=output)

    def judged(self, bench: RankBench, problem: RankedProblem) -> Control:
        """What this check says of a problem on a bench where something is wrong."""
        return "failed as it must" if self.run(Trial(bench, problem)) is not None else "did not fail"


def control_case(bench: RankBench, operator: str, axes: Mapping[str, Choice], *, alone: bool = False) -> RankedProblem:
    """This rank's view of a small case for a control; ``alone``: the only rank's in a world of one."""
    from polyaccel_conformance.multi.registry import ranked_set

    case = Case.of(operator, {"dtype": "float32", "ranks": 1 if alone else bench.world_size, **axes}, seed=1)
    return ranked(ranked_set(operator).problem(case)).on_rank(0 if alone else bench.rank)


ALL_REDUCE: Mapping[str, Choice] = {
    "dims.rows": 2,
    "dims.width": 3,
    "data": "digits",
    "structure.scenario": "plain",
}
"""A small sum over ranks."""


class Collectives(RankCheck):
    """Every rank ends with the same bits where the contract says so; a collective ends with the right ones."""

    name = "comm.collectives"

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        observation = trial.observe()
        if observation.error is not None:
            raise observation.error
        seen = bench.control.gather(self.name, _digests(problem, observation))
        if problem.spec.group == "ranks":
            for name, expected in trial.expected.items():
                output = observation.outputs.get(name)
                if output is None:
                    return self.fail("no output", f"{name} was not returned", name)
                assert isinstance(expected, Expected)
                found = compare(expected, output.values, output.dtype)
                if found is not None:
                    return self.fail(found.cause, found.message, name)
        for name in sorted(problem.replicated):
            kinds = {digests[name] for digests in seen if isinstance(digests, dict) and name in digests}
            if len(kinds) > 1:
                groups = [[r for r, d in enumerate(seen) if isinstance(d, dict) and d.get(name) == k] for k in kinds]
                return self.fail("ranks differ", f"{name} has other bits on ranks {sorted(groups)}", name)
        return None

    def control(self, bench: Bench) -> Control:
        ranks = rank_bench(bench)

        def differing(call: Call) -> Call:
            def wrong(x: torch.Tensor, *others: object) -> object:
                result = call(x, *others)
                bench.synchronize()
                if ranks.rank == ranks.world_size - 1:
                    x.view(-1)[-1:].mul_(1 + 2.0**-20)
                    bench.synchronize()
                return result

            return wrong

        return self.judged(ranks.spoiled(differing), control_case(ranks, "all_reduce", ALL_REDUCE))


class Trace(RankCheck):
    """A call sends exactly the collectives of its operator: kind, bytes and count, seen by the core; all ranks run the
    same implementation."""

    name = "comm.trace"

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        observation = trial.observe()
        if observation.error is not None:
            raise observation.error
        plans = bench.control.gather(self.name, str(observation.planned))
        if len(set(map(str, plans))) > 1:
            return self.fail("ranks planned differently", f"plans by rank: {plans}")
        traced = problem.traced
        if traced is None:
            return self.fail("not traced", "the call ended without a trace")
        wrong = _sent_wrong(traced)
        return None if wrong is None else self.fail(*wrong)

    def control(self, bench: Bench) -> Control:
        ranks = rank_bench(bench)

        def talkative(call: Call) -> Call:
            def wrong(*arguments: object) -> object:
                result = call(*arguments)
                ranks.comm.barrier()
                return result

            return wrong

        return self.judged(ranks.spoiled(talkative), control_case(ranks, "all_reduce", ALL_REDUCE))


def _sent_wrong(traced: Traced) -> tuple[str, str] | None:
    if not traced.seen and all(c.nbytes == 0 and c.kind != "barrier" for c in traced.expected):
        # Nothing to send: a backend may leave the call out, as all ranks do alike.
        return None
    sent, allowed = [c.kind for c in traced.seen], [c.kind for c in traced.expected]
    if sent != allowed:
        return "other collectives", f"sent {_written(traced.seen)}, specified are {_written(traced.expected)}"
    for seen, expected in zip(traced.seen, traced.expected, strict=True):
        if not expected.nbytes <= seen.nbytes <= expected.nbytes + traced.riding:
            more = f" and at most {traced.riding} riding along" if traced.riding else ""
            return "other bytes", f"{seen.kind} of {seen.nbytes} bytes, specified are {expected.nbytes}{more}"
    return None


def _written(collectives: tuple[Collective, ...]) -> str:
    return ", ".join(f"{c.kind} of {c.nbytes} bytes" for c in collectives) or "nothing"


class Memory(RankCheck):
    """Weight bytes of a rank are at most the whole divided by the number of ranks, and what is replicated."""

    name = "comm.memory"

    def concerns(self, case: Case, problem: RankedProblem) -> bool:
        return problem.evenly_cut

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        return self._judge(problem.shares(bench), problem.world_size)

    def _judge(self, shares: Shares, world_size: int) -> Failure | None:
        if shares.held * world_size <= shares.whole + shares.replicated * world_size:
            return None
        return self.fail(
            "more than a share",
            f"{shares.held} bytes of {shares.whole} on {world_size} ranks; at most "
            f"{shares.whole / world_size:.0f} and {shares.replicated} replicated",
        )

    def control(self, bench: Bench) -> Control:
        """The uncut weight on this rank, as of a world of one."""
        ranks = rank_bench(bench)
        uncut = control_case(ranks, "row_parallel_linear", EVEN_LINEAR, alone=True).shares(ranks)
        return "failed as it must" if self._judge(uncut, ranks.world_size) is not None else "did not fail"


class Barrier(RankCheck):
    """No rank leaves before every rank has come."""

    name = "comm.barrier"

    def concerns(self, case: Case, problem: RankedProblem) -> bool:
        return case.operator == "barrier"

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        prepared = problem.place(bench)
        call = bench.resolve("barrier", prepared).call
        # All start together, so that the delays of the case are what sets them apart.
        bench.control.gather(f"{self.name}: begin")
        problem.delay()
        came = time.monotonic()
        call_by_name(call, ("comm",), prepared.arguments)
        bench.synchronize()
        left = time.monotonic()
        times = [moments for moments in bench.control.gather(self.name, (came, left)) if isinstance(moments, tuple)]
        last = max(moments[0] for moments in times)
        early = [rank for rank, moments in enumerate(times) if moments[1] < last]
        if early:
            return self.fail("left early", f"ranks {early} left before the last rank had come")
        return None

    def control(self, bench: Bench) -> Control:
        ranks = rank_bench(bench)
        problem = control_case(ranks, "barrier", {"skew": (0, 100)})
        return self.judged(ranks.spoiled(lambda call: lambda comm: None), problem)


def _digests(problem: RankedProblem, observation: Observation) -> dict[str, str]:
    found = {}
    for name in problem.replicated & set(observation.outputs):
        output = observation.outputs[name]
        hasher = hashlib.sha256(f"{output.dtype}{output.bits.shape}".encode())
        hasher.update(output.bits.tobytes())
        found[name] = hasher.hexdigest()
    return found


EVEN_LINEAR: Mapping[str, Choice] = {
    "dims.tokens": 1,
    "dims.k": 16,
    "dims.n": 16,
    "data": "digits",
    "attributes.reduce": True,
    "structure.adapters": "none",
    "structure.ranks": "one",
    "structure.bias": False,
    "structure.even": True,
    "structure.operand": "none",
}

COMM_CHECKS: Mapping[str, Check] = MappingProxyType(
    {check.name: check for check in (Collectives(), Trace(), Memory(), Barrier())}
)
