"""The backend: own weights and steps, a few operators and one station, the core's composites for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polyaccel.backend import (
    Availability,
    Backend,
    Device,
    DeviceState,
    Entry,
    OperatorError,
    Query,
    Step,
    StepInput,
    TorchDevice,
    Weight,
    WeightSpec,
)
from polyaccel.backend.backend import Implementations
from polyaccel_frozen_1_0.step import UploadedStep
from polyaccel_frozen_1_0.weight import TransposedWeight


class FrozenBackend(Backend):
    """Drives torch's CPU with 32-token KV blocks."""

    name = "frozen"
    priority = None

    def probe(self) -> Availability:
        return Availability(usable=True, devices=("cpu",))

    def devices(self) -> Sequence[Device]:
        return (TorchDevice("cpu", index=0, name="frozen:0"),)

    def operators(self) -> Mapping[str, Implementations]:
        return {
            "linear": Entry(self._linear, supports=_float_weights),
            "dequantize": self._dequantize,
            "rms_norm": [
                Entry(self._rms_norm_small, supports=_small_hidden, name="frozen.rms_norm_small", detail="one block"),
                Entry(self._rms_norm, name="frozen.rms_norm"),
            ],
            "gate_up_act": Entry(self._gate_up_act, supports=_without_adapters, name="frozen.gate_up_act"),
        }

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return TransposedWeight(spec, device, tied)

    def kv_block_size(self) -> int:
        return 32

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        return UploadedStep(inputs, state, device)

    # -- operators -----------------------------------------------------------------------------------------------------

    def _linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        own = _own(weight)
        return self.launcher.launch("frozen.linear", (x, own.stored, own.bias), _product, x, own)

    def _dequantize(self, weight: Weight) -> torch.Tensor:
        return _own(weight).stored.transpose(-1, -2)

    def _gate_up_act(self, x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> torch.Tensor:
        gate, up = self._linear(x, weight).float().chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).to(x.dtype)

    def _rms_norm_small(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> object:
        return self._norm("frozen.rms_norm_small", x, weight, eps, residual)

    def _rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> object:
        return self._norm("frozen.rms_norm", x, weight, eps, residual)

    def _norm(
        self, kernel: str, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> object:
        def run() -> object:
            total = x if residual is None else x + residual
            wide = total.float()
            normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
            return normed if residual is None else (normed, total)

        return self.launcher.launch(kernel, (x, weight, residual), run)


def _product(x: torch.Tensor, weight: TransposedWeight) -> torch.Tensor:
    y = x @ weight.stored
    return y if weight.bias is None else y + weight.bias


def _own(weight: Weight) -> TransposedWeight:
    if not isinstance(weight, TransposedWeight):
        raise OperatorError("linear", f"the weight of {weight.spec.site!r} is a {type(weight).__name__}")
    return weight


def _float_weights(query: Query) -> list[str]:
    return ["quantised weights are not supported"] if query.static.get("quantised") else []


def _small_hidden(query: Query) -> list[str]:
    hidden = query.integer("hidden")
    return [] if hidden <= 64 else [f"hidden {hidden} exceeds 64"]


def _without_adapters(query: Query) -> list[str]:
    reasons = [f"adapters of rank {query.integer('largest_rank')} are not fused"] if query.adapters else []
    if query.static.get("act") != "silu":
        reasons.append(f"activation {query.static.get('act')} is not silu")
    return reasons
