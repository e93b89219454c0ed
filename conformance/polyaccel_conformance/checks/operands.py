"""Operands of row-parallel stations that are not contiguous, one at a time.

Founding case: one non-contiguous input made a fused matmul + all-reduce fail on several cards, with a trace that named
another operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.checks.comm import RankCheck, control_case, ranked
from polyaccel_conformance.harness.dispatch import PlainDispatchMode
from polyaccel_conformance.multi.bench import Call, RankBench, rank_bench
from polyaccel_conformance.multi.problem import RankedProblem
from polyaccel_conformance.problems.sharded import OPERANDS
from polyaccel_conformance.trial import Observation, Trial

COPIES = frozenset({"clone", "copy_", "_to_copy", "contiguous"})
COPY_PREFIX = "copy."
STATIONS = ("row_parallel_linear", "row_parallel_add_norm")


class Copies(PlainDispatchMode):
    """Counts the copies that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in COPIES:
            self.count += 1
        return func(*args, **(kwargs or {}))


class RowParallelOperands(RankCheck):
    """x, weight, bias and addend not contiguous one at a time, alone and with all ranks: the same bits as from a
    contiguous one, and the ledger counts exactly the copy that was made of that operand, if one was."""

    name = "comm.row_parallel_operands"

    def concerns(self, case: Case, problem: RankedProblem) -> bool:
        return case.operator in STATIONS and case.structure.get("operand", "none") != "none"

    def run(self, trial: Trial) -> Failure | None:
        bench, problem = rank_bench(trial.bench), ranked(trial.problem)
        case = problem.case
        alone = case.with_(ranks=1, skew=())
        wrong = self._asked(bench.alone(), alone, type(problem), 0)
        # All ranks go on together, whatever one of them has found alone.
        return self._asked(bench, case, type(problem), bench.rank) or wrong

    def _asked(self, bench: RankBench, case: Case, kind: type[RankedProblem], rank: int) -> Failure | None:
        operand = str(case.structure["operand"])
        argument, layout = OPERANDS[operand]
        plain, plain_copies = self._observe(bench, kind(_laid_out(case, {}), rank))
        odd, odd_copies = self._observe(bench, kind(_laid_out(case, {argument: layout}), rank))
        where = f"{operand} not contiguous, world {case.ranks}"
        for name, output in plain.outputs.items():
            other = odd.outputs.get(name)
            if other is None or not np.array_equal(output.bits, other.bits):
                return self.fail(
                    f"{argument}: other bits", f"{where}: {name} differs from that of a contiguous one", name
                )
        counted = {
            kernel: count - plain.ledger.get(kernel, 0)
            for kernel, count in odd.ledger.items()
            if kernel.startswith(COPY_PREFIX) and count != plain.ledger.get(kernel, 0)
        }
        made = odd_copies - plain_copies
        own = {kernel: count for kernel, count in counted.items() if kernel.rsplit(".", 1)[-1] == argument}
        if own != counted:
            return self.fail(f"{argument}: other copy", f"{where}: the ledger counts {counted}")
        total = sum(own.values())
        if total > 1 or (argument in ("weight", "bias") and total):
            return self.fail(f"{argument}: too many copies", f"{where}: the ledger counts {counted}")
        if made > total:
            return self.fail(
                f"{argument}: copy not counted", f"{where}: {made} more copies were made, the ledger counts {total}"
            )
        return None

    def _observe(self, bench: RankBench, problem: RankedProblem) -> tuple[Observation, int]:
        copies = Copies()

        def watched(call: Call) -> Call:
            def counted(*arguments: object) -> object:
                with copies:
                    result = call(*arguments)
                    # What is only queued is done here.
                    bench.synchronize()
                return result

            return counted

        observation = Trial(bench.spoiled(watched), problem).observe()
        if observation.error is not None:
            raise observation.error
        return observation, copies.count

    def control(self, bench: Bench) -> Control:
        """A copy that the ledger does not know of."""
        ranks = rank_bench(bench)

        def hiding(call: Call) -> Call:
            return lambda x, *others: call(x if x.is_contiguous() else x.contiguous(), *others)

        problem = control_case(ranks, "row_parallel_linear", OPERAND_LINEAR)
        return self.judged(ranks.spoiled(hiding), problem)


OPERAND_LINEAR: Mapping[str, Choice] = {
    "dims.tokens": 3,
    "dims.k": 16,
    "dims.n": 5,
    "data": "digits",
    "attributes.reduce": True,
    "structure.adapters": "none",
    "structure.ranks": "one",
    "structure.bias": False,
    "structure.operand": "x",
}


def _laid_out(case: Case, layouts: Mapping[str, str]) -> Case:
    axes = {path: value for path, value in case.axes().items() if not path.startswith("layouts.")}
    axes |= {f"layouts.{argument}": layout for argument, layout in layouts.items()}
    return Case.of(case.operator, axes, case.seed)


OPERAND_CHECKS: Mapping[str, Check] = MappingProxyType({check.name: check for check in (RowParallelOperands(),)})
