"""What libraries raise inside an operator becomes an error of the contract."""

from __future__ import annotations

import pytest
import torch

from polyaccel.backend import OperatorError, Plan, SiteRequest, TableBackend
from polyaccel.backend.errors import OutOfMemory
from polyaccel.backend.failure import UNTYPED, typed


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


def test_a_library_out_of_memory_is_the_contracts_own_error() -> None:
    found = typed("gelu", torch.OutOfMemoryError("2 GiB"), (torch.zeros(1),), {})
    assert isinstance(found, OutOfMemory)
    assert str(found) == "operator 'gelu' found no room for its result: 2 GiB"


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
