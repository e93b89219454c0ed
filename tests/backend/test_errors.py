"""Errors: one tree, messages with the values, and the same object on the other side of a pipe."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

from polyaccel.backend import errors
from polyaccel.backend.errors import AdapterNotFound, OperandInfo, OperatorError, PolyaccelError, WorkerError

CLASSES = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, PolyaccelError)]


def test_every_error_is_exported_by_the_package() -> None:
    import polyaccel

    assert {c.__name__ for c in CLASSES} <= set(polyaccel.__all__)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[PolyaccelError]) -> None:
    made: PolyaccelError
    if kind is OperatorError:
        made = OperatorError.describe("sgmv", "wrong width", {"x": torch.zeros(2, 3)}, rank=1)
    elif kind is WorkerError:
        made = WorkerError(2, "ValueError: 7", "Traceback: ...")
    else:
        made = kind("what failed, 7, what to do")
    copy = pickle.loads(pickle.dumps(made))
    assert type(copy) is kind
    assert (str(copy), copy.args) == (str(made), made.args)
    assert vars(copy) == vars(made)


def test_an_operator_error_names_operator_rank_and_every_operand() -> None:
    x = torch.zeros(4, 6, dtype=torch.bfloat16).t()
    error = OperatorError.describe("row_parallel_linear", "not contiguous", {"x": x, "ids": torch.zeros(2).long()}, 3)
    text = str(error)
    assert text.startswith("operator 'row_parallel_linear' on rank 3: not contiguous")
    assert "x: bfloat16[6, 4] stride [1, 6] on cpu, non-contiguous" in text
    assert "ids: int64[2] stride [1] on cpu, contiguous" in text
    assert error.operands[0] == OperandInfo.of("x", x)


def test_an_operator_error_does_not_keep_the_tensors() -> None:
    import gc
    import weakref

    x = torch.zeros(3)
    alive = weakref.ref(x)
    error = OperatorError.describe("linear", "wrong", {"x": x})
    del x
    gc.collect()
    assert alive() is None
    assert "float32[3]" in str(error)


def test_a_missing_adapter_prints_its_message_and_not_its_repr() -> None:
    assert str(AdapterNotFound("adapter 'a' is not loaded")) == "adapter 'a' is not loaded"
    assert str(AdapterNotFound()) == ""
