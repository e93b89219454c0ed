"""The CPU backend's stations: what lies between two products of a layer, in as few passes as torch allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.cpu import dense
from polyaccel.backend.cpu.kv_cache import HeadMajorKVCache
from polyaccel.backend.cpu.linear import check_rows, multiply_add
from polyaccel.backend.cpu.operators import CpuOperators
from polyaccel.backend.cpu.step import CpuStep, own_cache
from polyaccel.backend.cpu.weight import PackedWeight
from polyaccel.backend.guard import Launcher
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import RowSet, Step
from polyaccel.backend.weight import Weight


class CpuStations:
    """Stations of one backend instance."""

    def __init__(self, launcher: Launcher, operators: CpuOperators) -> None:
        self._launch = launcher.launch
        self._operators = operators

    def table(self) -> Mapping[str, Callable[..., object]]:
        return {
            "column_linear": self.column_linear,
            "qkv_rope_cache": self.qkv_rope_cache,
            "gate_up_act": self.gate_up_act,
            "row_parallel_linear": self.row_parallel_linear,
            "row_parallel_add_norm": self.row_parallel_add_norm,
        }

    def column_linear(self, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
        return self._adapted("column_linear", x, weight, step, row_set)

    def qkv_rope_cache(
        self,
        x: torch.Tensor,
        weight: Weight,
        step: Step,
        rope: RopeTable,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv: KVCache,
        layer: int,
        head_dim: int,
    ) -> torch.Tensor:
        cache = own_cache("qkv_rope_cache", kv)
        y = self._adapted("qkv_rope_cache", x, weight, step, "tokens")
        own = CpuStep.of("qkv_rope_cache", step)
        cos, sin = own.rope_rows(rope)
        heads = y.view(y.shape[0], y.shape[1] // head_dim, head_dim)
        return self._launch(
            "cpu.rope_cache",
            (y, cos, sin, q_norm, k_norm),
            rope_cache,
            heads,
            weight.spec.slices[0].n // head_dim,
            cos,
            sin,
            rope.style,
            q_norm,
            k_norm,
            eps,
            cache,
            layer,
            own.kv_rows(cache),
        )

    def gate_up_act(self, x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> torch.Tensor:
        y = self._adapted("gate_up_act", x, weight, step, "tokens")
        return self._operators.silu_and_mul(y)

    def row_parallel_linear(
        self, x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        y = self._adapted("row_parallel_linear", x, weight, step, "tokens")
        if reduce and comm.world_size > 1:
            return self._launch("cpu.all_reduce", (y,), comm.all_reduce, y)
        return y

    def row_parallel_add_norm(
        self,
        x: torch.Tensor,
        weight: Weight,
        step: Step,
        comm: Communicator,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        operators = self._operators
        if comm.world_size > 1:
            y = self.row_parallel_linear(x, weight, step, comm)
            s = self._launch("cpu.add", (y, residual), y.add_, residual)
        else:
            own = check_rows("row_parallel_add_norm", x, weight)
            x = operators.contiguous("row_parallel_add_norm", "x", x)
            residual = operators.contiguous("row_parallel_add_norm", "residual", residual)
            s = self._launch("cpu.linear_add", (x, residual), multiply_add, x, own, residual)
            s = self._adapt(s, x, own, step, "tokens")
        return self._launch("cpu.rms_norm", (s, norm_weight), dense.rms_norm, s, norm_weight, eps), s

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _adapted(self, station: str, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet) -> torch.Tensor:
        """``x @ W.T + bias`` and the step's adapters; a new contiguous tensor."""
        own = check_rows(station, x, weight)
        x = self._operators.contiguous(station, "x", x)
        return self._adapt(self._operators.project(x, own), x, own, step, row_set)

    def _adapt(
        self, y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, step: Step, row_set: RowSet
    ) -> torch.Tensor:
        if not step.input.has_adapters:
            return y
        return self._operators.adapt(y, x, weight, CpuStep.of("sgmv", step), row_set)


def rope_cache(
    x: torch.Tensor,
    q_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv: HeadMajorKVCache,
    layer: int,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Norm and rotate q and k in place in ``x: [T, q heads + 2 kv_heads, head_dim]``, store k and v; returns q."""
    q, stored = x[:, :q_heads], x[:, q_heads:]
    kv_heads = kv.spec.kv_heads
    if q_norm is not None:
        q.copy_(dense.rms_norm(q, q_norm, eps))
    if k_norm is not None:
        k = stored[:, :kv_heads]
        k.copy_(dense.rms_norm(k, k_norm, eps))
    dense.rotate_(x[:, : q_heads + kv_heads], cos, sin, style)
    kv.store(layer, rows, stored if stored.dtype == kv.spec.dtype else stored.to(kv.spec.dtype))
    return q
