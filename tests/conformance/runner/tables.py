"""Tables and backends that the runner's tests hand to workers. A worker opens this file by its path."""

from __future__ import annotations

import os
import signal
import time

import torch

from polyaccel.backend import Backend, DeviceLost, TableBackend, TorchDevice
from polyaccel.backend.composite.dense import layer_norm, rms_norm


def right(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return layer_norm(x, weight, bias, eps)


def wrong_in_column_two(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    y = layer_norm(x, weight, bias, eps)
    if y.shape[-1] > 2:
        y[..., 2] += 64
    return y


def dies_with_a_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if bias is not None and x.shape[-1] == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return layer_norm(x, weight, bias, eps)


def hangs_in_half(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if x.dtype is torch.float16 and x.shape[-1] == 2:
        time.sleep(3600)
    return layer_norm(x, weight, bias, eps)


RIGHT = {"layer_norm": right}
WRONG = {"layer_norm": wrong_in_column_two}
DIES = {"layer_norm": dies_with_a_bias}
HANGS = {"layer_norm": hangs_in_half}
NUMBER = 7


class Spawned(TableBackend):
    """Cannot follow a fork, and says so."""

    def __init__(self) -> None:
        super().__init__("cpu", {"rms_norm": rms_norm}, name="spawned")
        self.fork_safe = False


class Fragile(TorchDevice):
    """After its first failure it reports nothing but that failure."""

    lost = False

    def synchronize(self) -> None:
        if self.lost:
            raise DeviceLost("an earlier call failed")


class Poisoned(TableBackend):
    """A float16 call fails, and takes the device with it."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16,)

    def __init__(self) -> None:
        self.fragile = Fragile("cpu")
        super().__init__(self.fragile, {"rms_norm": self._rms_norm}, name="poisoned")

    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> object:
        if x.dtype in self.dtypes:
            self.fragile.lost = True
        if self.fragile.lost:
            raise DeviceLost("this call failed")
        return rms_norm(x, weight, eps, residual)


class Lost(Poisoned):
    """No call succeeds."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32)


def composites() -> Backend:
    return TableBackend("cpu", {}, name="composites")


def folded() -> Backend:
    from tests.backends.folded.backend import FoldedBackend

    return FoldedBackend()
