"""Every operator and station of the CUDA backend against the oracle, interpreted.

The cases are those that the conformance suite lists for any backend, less bfloat16, which the interpreter multiplies as
integers (Triton 3.6), and the largest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.trial import Trial

SEED = 20261122
CASES = 12
LARGEST = 600
OPERATORS = (
    "linear",
    "embedding",
    "rms_norm",
    "layer_norm",
    "rotary_embedding",
    "silu_and_mul",
    "gelu",
    "select_rows",
    "write_kv_cache",
    "paged_attention",
    "sgmv",
    "sgmv_shrink",
    "sgmv_expand",
    "sample",
    "column_linear",
    "qkv_rope_cache",
    "gate_up_act",
    "row_parallel_linear",
    "row_parallel_add_norm",
)


@pytest.fixture(scope="module")
def bench() -> Bench:
    from tests.backends.interpreted.backend import InterpretedBackend

    return Bench(InterpretedBackend())


def cases(operator: str) -> Sequence[Case]:
    """The same ones every time, of all that suit an interpreter."""
    listed = [item.case for item in fixed(PROBLEM_SETS[operator])]
    suited = [
        case
        for case in listed
        if case.ranks == 1 and case.dtype != "bfloat16" and max(case.dims.values(), default=0) <= LARGEST
    ]
    return random.Random(SEED).sample(suited, min(CASES, len(suited)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_computes_what_the_oracle_says(operator: str, bench: Bench) -> None:
    compared = 0
    for case in cases(operator):
        problem = PROBLEM_SETS[operator].problem(case)
        trial = Trial(bench, problem)
        for name in ("values.exact", "values.bound", "memory.reads"):
            check = CHECKS.get(name)
            if check is None or not check.applies(case, problem):
                continue
            failure = check.run(trial)
            assert failure is None, f"{case}: {failure}"
            compared += name.startswith("values.")
    assert compared >= CASES // 2


def test_every_native_operator_is_tested(bench: Bench) -> None:
    from polyaccel_cuda.collectives import COLLECTIVES

    # What ranks do together has tests of its own.
    assert {*OPERATORS, "dequantize"} == set(bench.backend.table()) - set(COLLECTIVES)
