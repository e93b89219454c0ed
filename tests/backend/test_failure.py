"""What libraries raise inside an operator becomes an error of the contract."""

from __future__ import annotations

import pytest
import torch

from polyaccel.backend import OperatorError, Plan, SiteRequest, TableBackend
from polyaccel.backend.errors import OutOfMemory
from polyaccel.backend.failure import UNTYPED, ran_out_of_memory, typed


@pytest.mark.parametrize("kind", UNTYPED)
def test_the_error_names_operator_rank_and_every_tensor(kind: type[Exception]) -> None:
    error = kind("size 3")
    found = typed("rms_norm", error, (torch.zeros(2, 3), torch.zeros(4), 1e-5), {"residual": torch.zeros(2, 3)}, 1)
    assert isinstance(found, OperatorError)
    assert (found.operator, found.rank) == ("rms_norm", 1)
    assert found.reason == f"{type(error).__name__}: size 3"
    assert [(o.name, o.shape) for o in found.operands] == [("x", (2, 3)), ("weight", (4,)), ("residual", (2, 3))]


@pytest.mark.parametrize(
    "error",
    [
        OperatorError("gelu", "no"),
        OutOfMemory("2 GiB"),
        NotImplementedError("aten::x"),
    ],
)
def test_errors_that_say_more_stay_what_they_are(error: Exception) -> None:
    assert typed("gelu", error, (), {}) is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("2 GiB"),
        MemoryError("2 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=str,
)
def test_a_library_out_of_memory_is_the_contracts_own_error(error: Exception) -> None:
    assert ran_out_of_memory(error)
    found = typed("gelu", error, (torch.zeros(1),), {})
    assert isinstance(found, OutOfMemory)
    assert str(found) == f"operator 'gelu' found no room for its result: {error}"


@pytest.mark.parametrize(
    "error", [OperatorError("gelu", "out of memory"), ValueError("out of memory"), RuntimeError("size 3")], ids=str
)
def test_what_only_mentions_memory_is_no_lack_of_it(error: Exception) -> None:
    assert not ran_out_of_memory(error)


def test_the_hosts_own_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)


def test_an_operator_outside_of_the_vocabulary_numbers_its_arguments() -> None:
    found = typed("mystery", RuntimeError("no"), (1, torch.zeros(1)), {})
    assert isinstance(found, OperatorError)
    assert [operand.name for operand in found.operands] == ["argument 1"]


def test_composites_and_native_calls_raise_it_with_the_cause() -> None:
    plan = Plan(TableBackend("cpu", {}), [SiteRequest(site="n", operator="rms_norm")], policy="allow")
    with pytest.raises(OperatorError, match="operator 'rms_norm'") as caught:
        plan["n"].calls[0](torch.zeros(2, 3), torch.zeros(4), 1e-5)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [operand.name for operand in caught.value.operands] == ["x", "weight"]
