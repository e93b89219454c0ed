"""Composites on devices other than the CPU: one that has no values, and whatever accelerator this machine has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyaccel.backend.device import TorchDevice
from tests.backend.composite.cases import CPU
from tests.backend.composite.operands import results_on


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.nonzero])
def test_a_device_without_values_cannot_be_read(read: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.empty(1, device="meta"))


@pytest.mark.parametrize("adapted", [False, True])
def test_every_composite_runs_on_a_device_that_cannot_be_read(adapted: bool) -> None:
    expected = results_on(CPU, adapted=adapted)
    for name, tensors in results_on(TorchDevice("meta"), adapted=adapted).items():
        assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in expected[name]], name
        assert {t.device.type for t in tensors} <= {"meta"}, name


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator that torch can use")
@pytest.mark.parametrize("adapted", [False, True])
def test_every_composite_computes_the_same_on_an_accelerator(adapted: bool) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    expected = results_on(CPU, adapted=adapted)
    for name, tensors in results_on(TorchDevice(device), adapted=adapted).items():
        for got, wanted in zip(tensors, expected[name], strict=True):
            assert got.device.type == device.type, name
            torch.testing.assert_close(
                got.cpu(), wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_adapters_change_what_they_are_applied_to_and_nothing_else() -> None:
    plain, adapted = (results_on(CPU, adapted=a) for a in (False, True))
    changed = {name for name in plain if not all(map(torch.equal, plain[name], adapted[name]))}
    assert changed == {"embedding", "sgmv", "sgmv_shrink", "sgmv_expand", "moe_experts", "quantised moe_experts"}
