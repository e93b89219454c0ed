"""One case on one rank, in lock-step with the others: every rank asks the same checks in the same order."""

from __future__ import annotations

from polyaccel.backend import CommunicationError, DeviceLost
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, run_case
from polyaccel_conformance.multi.bench import RankBench
from polyaccel_conformance.multi.control import Abandoned, RankVerdict, RunCase
from polyaccel_conformance.multi.problem import RankedProblem
from polyaccel_conformance.multi.registry import ranked_set

_SPOILING = (CommunicationError.__name__, DeviceLost.__name__)
"""Errors after which nothing on this rank can be trusted."""


def run_on_rank(bench: RankBench, order: RunCase) -> RankVerdict:
    """This rank's share of a case.

    Raises:
        UsageError: an operator without cases for several ranks, or a check that is not known.
    """
    case = Case.from_json(order.case)
    problem = ranked_set(case.operator).problem(case)
    if isinstance(problem, RankedProblem):
        problem = problem.on_rank(bench.rank)
    bench.comm.trace = None
    only = problem.only if isinstance(problem, RankedProblem) else ""
    names = tuple(name for name in order.checks if only in ("", name))
    try:
        result = run_case(bench, problem, checks_named(names), thorough=len(names) == 1)
    except Abandoned as error:
        return RankVerdict(ending="abandoned", text=str(error), broken=True)
    broken = any(failure.message.startswith(_SPOILING) for failure in result.failures)
    abandoned = any(failure.message.startswith(Abandoned.__name__) for failure in result.failures)
    return RankVerdict(
        ending="abandoned" if abandoned else "finished", result=result, broken=broken or abandoned or bool(only)
    )


def ask_control(bench: RankBench, check: str) -> RankVerdict:
    """This rank's share of a check's control."""
    (found,) = checks_named((check,))
    return RankVerdict(ending="finished", control=found.control(bench))


def checks_named(names: tuple[str, ...]) -> list[Check]:
    """Checks by name, in this order.

    Raises:
        UsageError: one that is not known.
    """
    from polyaccel_conformance.checks.registry import CHECKS
    from polyaccel_conformance.errors import UsageError

    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        raise UsageError(f"unknown checks {unknown}")
    return [CHECKS[name] for name in names]
