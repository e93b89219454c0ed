"""Operands of a dtype that an operator does not take are refused by name, before anything reaches the card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyaccel.backend import DeviceState, OperatorError, SamplingSpec
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.device import NpuDevice
from tests.npu.test_found import step_of

NO_ROWS = np.zeros(0, dtype=np.int32)


@pytest.mark.parametrize(("operator", "argument"), [("select_rows", "x"), ("sample", "logits")])
def test_integers_are_refused_where_floats_are_wanted(
    backend: NpuBackend, device: NpuDevice, operator: str, argument: str
) -> None:
    """Found by the suite: a card has no float64, and what it was handed instead came back cut to integers."""
    inputs = replace(step_of(NO_ROWS, NO_ROWS, 3), logits_rows=np.array([2], dtype=np.int64))
    step = backend.begin_step(inputs, DeviceState(), device)
    state = backend.allocate_sampling(SamplingSpec(request_slots=4, vocabulary=5), device)
    others: tuple[Any, ...] = (state, step) if operator == "sample" else (step,)
    x = device.upload(torch.ones(3, 5, dtype=torch.int32))
    before = dict(backend.ledger.counts())
    with pytest.raises(OperatorError, match=rf"{argument}: int32\[3, 5\]"):
        backend.table()[operator][0].fn(x, *others)
    assert dict(backend.ledger.counts()) == before
