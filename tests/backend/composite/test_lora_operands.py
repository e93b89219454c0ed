"""Operands of the LoRA operators that do not fit are refused before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyaccel.backend import OperatorError
from polyaccel.backend.composite.lora import sgmv_expand
from polyaccel.backend.weight import Slice, WeightSpec


class _Weight:
    spec = WeightSpec(site="s", slices=(Slice(name="q", n=4),), k=3, dtype=torch.float32)


@pytest.mark.parametrize("y", [torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 5)], ids=["dtype", "width"])
def test_an_expand_into_rows_of_another_kind_is_refused(y: torch.Tensor) -> None:
    weight: Any = _Weight()
    step: Any = None
    with pytest.raises(OperatorError, match=r"y must be torch\.float32 rows of 4"):
        sgmv_expand(y, torch.zeros(1, 1, 1), weight, step)


def test_operands_on_two_devices_are_refused_by_both_names() -> None:
    weight: Any = _Weight()
    step: Any = None
    h = torch.zeros(1, 1, 1, device="meta")
    with pytest.raises(OperatorError, match="y and h are on two devices") as raised:
        sgmv_expand(torch.zeros(2, 4), h, weight, step)
    assert {operand.name for operand in raised.value.operands} == {"y", "h"}
