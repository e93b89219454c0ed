"""``batch_invariant``: products of any number of rows in one form, and what refuses the promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import RankAddress, Slice, WeightSpec
from polyaccel.backend.errors import ConfigurationError
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.trial import Trial

pytest.importorskip("triton", reason="run tox -e triton")

OPERATORS = (
    "linear",
    "embedding",
    "paged_attention",
    "sgmv",
    "column_linear",
    "qkv_rope_cache",
    "gate_up_act",
    "row_parallel_add_norm",
    "sample",
)
FEW = 64
"""Rows up to which products are a kernel's and read the rank rows that a step lists."""


@pytest.fixture(scope="module")
def bench() -> Bench:
    from tests.backends.interpreted.backend import InterpretedBackend

    backend = InterpretedBackend()
    backend.require_batch_invariance()
    return Bench(backend)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_computes_what_the_oracle_says(operator: str, bench: Bench) -> None:
    listed = [item.case for item in fixed(PROBLEM_SETS[operator]) if item.case.ranks == 1]
    listed = [case for case in listed if case.dtype != "bfloat16" and max(case.dims.values(), default=0) <= 600]
    many = [case for case in listed if case.dims.get("tokens", 0) > FEW]
    compared = 0
    for case in [*many[:3], *listed[:4]]:
        problem = PROBLEM_SETS[operator].problem(case)
        trial = Trial(bench, problem)
        for name in ("values.exact", "values.bound"):
            check = CHECKS[name]
            if check.applies(case, problem):
                failure = check.run(trial)
                assert failure is None, f"{case}: {failure}"
                compared += 1
    assert compared >= 4


@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 140),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 2**20),
)
def test_an_invariant_product_is_right_for_any_number_of_rows(
    rows: int, n: int, k: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    from polyaccel_cuda.kernels.invariant import product

    draw = torch.Generator().manual_seed(seed)
    x, matrix = torch.randn(rows, k + 3, generator=draw).to(dtype)[:, :k], torch.randn(n, k, generator=draw).to(dtype)
    bias = torch.randn(n, generator=draw).to(dtype) if biased else None
    expected = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
    room = torch.finfo(dtype).eps * (k + 4)
    torch.testing.assert_close(product(x, matrix, bias).double(), expected, rtol=room, atol=room)


def test_flashinfer_is_refused() -> None:
    from polyaccel_cuda.backend import CudaBackend

    with pytest.raises(ConfigurationError, match="how flashinfer cuts a context"):
        CudaBackend(attention="flashinfer").require_batch_invariance()


def test_experts_and_more_than_two_ranks_are_refused() -> None:
    from polyaccel.backend.cpu.backend import CpuBackend
    from polyaccel_cuda.backend import CudaBackend

    backend = CudaBackend()
    backend.require_batch_invariance()
    spec = WeightSpec(site="0.experts", slices=(Slice(name="w", n=8),), k=8, dtype=torch.float32, experts=2)
    with pytest.raises(ConfigurationError, match="experts depend on the batch"):
        backend.allocate_weight(spec, CpuBackend().devices()[0])
    with pytest.raises(ConfigurationError, match="3 ranks"):
        backend.connect(RankAddress(rank=0, world_size=3, init_method="tcp://127.0.0.1:1"))
    backend.close()
