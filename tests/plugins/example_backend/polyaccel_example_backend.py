"""A third-party backend: a device, the two mandatory operators, and one native operator of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polyaccel.backend import Availability, Backend, Device, Entry, Query, TorchDevice
from polyaccel.backend.backend import Implementations
from polyaccel.backend.composite.linear import dequantize, linear


class ExampleBackend(Backend):
    """Drives a torch device; everything it does not implement runs as the core's composites, and the plan says so."""

    name = "example"
    priority = None

    def probe(self) -> Availability:
        return Availability(usable=True, devices=("cpu",))

    def devices(self) -> Sequence[Device]:
        return (TorchDevice("cpu", name="example:0"),)

    def operators(self) -> Mapping[str, Implementations]:
        silu_and_mul = Entry(self._silu_and_mul, supports=_supports, evidence=("aten::silu", "aten::mul"))
        return {"linear": linear, "dequantize": dequantize, "silu_and_mul": silu_and_mul}

    def _silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return self.launcher.launch("example.silu_and_mul", (x,), _kernel, x)


def _supports(query: Query) -> list[str]:
    dtype = query.static.get("dtype")
    return [] if dtype in ("float32", "bfloat16", "float16") else [f"dtype {dtype} is not supported"]


def _kernel(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)
