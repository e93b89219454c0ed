"""After one asynchronous failure there are no numbers any more."""

from __future__ import annotations

import pytest
import torch

from polyaccel.backend import DeviceLost, Launcher, Ledger, OperatorError
from polyaccel_npu.errors import parse
from polyaccel_npu.health import Health
from polyaccel_npu.issue import Issuer
from tests.npu.test_errors import ASYNCHRONOUS, NEW


def failing(text: str) -> torch.Tensor:
    raise RuntimeError(text)


def test_a_refused_call_names_each_operand_and_leaves_the_device_well() -> None:
    issuer = Issuer(Launcher(Ledger(), rank=2), Health())
    x = torch.ones(4, 6).t()
    with pytest.raises(OperatorError) as caught:
        issuer.issue("mm_all_reduce_base", {"x1": x, "bias": None}, failing, NEW)
    text = str(caught.value)
    assert "npu.mm_all_reduce_base" in text
    assert "on rank 2" in text
    assert "161002" in text
    assert "x1: float32[6, 4] stride [1, 6] on cpu, non-contiguous" in text
    assert issuer.issue("relu", {"x": x}, torch.relu, x).shape == x.shape


def test_an_asynchronous_failure_ends_everything_that_follows() -> None:
    issuer = Issuer(Launcher(Ledger()), Health())
    x = torch.ones(2)
    with pytest.raises(DeviceLost, match="aclnnMatmulAllReduce"):
        issuer.issue("rms_norm", {"x": x}, failing, ASYNCHRONOUS + NEW)
    with pytest.raises(DeviceLost, match="aclnnMatmulAllReduce"):
        issuer.issue("relu", {"x": x}, torch.relu, x)


def test_blame_is_asked_once_and_its_answer_is_in_every_later_error() -> None:
    asked = []

    def blame() -> str:
        asked.append(1)
        return "blame: call 3 of 7"

    health = Health(blame)
    assert "call 3 of 7" in str(health.lose(parse(ASYNCHRONOUS), None))
    health.lose(parse(ASYNCHRONOUS), None)
    assert asked == [1]
    with pytest.raises(DeviceLost, match="call 3 of 7"):
        health.check()
