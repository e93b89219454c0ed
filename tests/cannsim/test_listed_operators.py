"""Operators of torch that run on CPU views, among those that go through torch_npu's own queue."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyaccel_cannsim.aten import in_use
from polyaccel_cannsim.simulator import Simulator

npu: Any = getattr(torch, "npu", None)
LISTED, STEPS = "aten::bitwise_and.Scalar", 300


@pytest.mark.parametrize("index", [0, 1])
def test_a_listed_operator_keeps_its_place_in_the_stream_whichever_card_is_current(
    cannsim: Simulator, index: int
) -> None:
    """Found by embeddings with adapters on 4 cards: a listed operator overtook what its card was to do before."""
    assert LISTED in {one.name for one in in_use(cannsim.rules)}
    assert npu.current_device() == 0
    counted = torch.zeros(64, dtype=torch.int32, device=f"npu:{index}")
    for _ in range(STEPS):
        counted = torch.bitwise_and(counted + 1, 0xFFFF)
    assert counted.unique().tolist() == [STEPS]
