"""The CPU backend's stations: what lies between two products of a layer, in as few passes as torch allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.cpu import dense
from polyaccel.backend.cpu.kv_cache import HeadMajorKVCache
from polyaccel.backend.cpu.linear import check_rows, multiply, multiply_add
from polyaccel.backend.cpu.operators import CpuOperators
from polyaccel.backend.cpu.step import CpuStep, own_cache
from polyaccel.backend.cpu.weight import PackedWeight
from polyaccel.backend.guard import Launcher
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import RowSet, Step
from polyaccel.backend.weight import Weight


class CpuStations:
    """Stations of one backend instance. Without adapters a station is one launch; adapters come between its parts."""

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
        own = check_rows("column_linear", x, weight)
        x = self._operators.contiguous("column_linear", "x", x)
        return self._adapted(x, own, CpuStep.of("column_linear", step), row_set)

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
        own, cache = check_rows("qkv_rope_cache", x, weight), own_cache("qkv_rope_cache", kv)
        own_step = CpuStep.of("qkv_rope_cache", step)
        x = self._operators.contiguous("qkv_rope_cache", "x", x)
        cos, sin = own_step.rope_rows(rope)
        q_heads = own.spec.slices[0].n // head_dim
        place = (cache, layer, own_step.kv_rows(cache))
        norms = (q_norm, k_norm, self._operators.scalar(eps))
        if own_step.adapted:
            y = self._adapted(x, own, own_step, "tokens")
            operands = (y, cos, sin, q_norm, k_norm)
            return self._launch(
                "cpu.rope_cache", operands, rope_cache, y, q_heads, head_dim, cos, sin, rope.style, norms, place
            )
        operands = (x, cos, sin, q_norm, k_norm)
        return self._launch(
            "cpu.qkv_rope_cache",
            operands,
            qkv_rope_cache,
            x,
            own,
            q_heads,
            head_dim,
            cos,
            sin,
            rope.style,
            norms,
            place,
        )

    def gate_up_act(self, x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> torch.Tensor:
        own, own_step = check_rows("gate_up_act", x, weight), CpuStep.of("gate_up_act", step)
        x = self._operators.contiguous("gate_up_act", "x", x)
        if own_step.adapted:
            return self._operators.silu_and_mul(self._adapted(x, own, own_step, "tokens"))
        return self._launch("cpu.gate_up_act", (x,), gate_up_act, x, own)

    def row_parallel_linear(
        self, x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        own = check_rows("row_parallel_linear", x, weight)
        x = self._operators.contiguous("row_parallel_linear", "x", x)
        y = self._adapted(x, own, CpuStep.of("row_parallel_linear", step), "tokens")
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
        operators, launch = self._operators, self._launch
        scalar = operators.scalar(eps)
        if comm.world_size > 1:
            y = self.row_parallel_linear(x, weight, step, comm)
            operands = (y, residual, norm_weight)
            return launch("cpu.add_rms_norm", operands, dense.add_rms_norm, y, residual, norm_weight, scalar)
        own, own_step = check_rows("row_parallel_add_norm", x, weight), CpuStep.of("row_parallel_add_norm", step)
        x = operators.contiguous("row_parallel_add_norm", "x", x)
        residual = operators.contiguous("row_parallel_add_norm", "residual", residual)
        if own_step.adapted:
            s = launch("cpu.linear_add", (x, residual), multiply_add, x, own, residual)
            s = operators.adapt(s, x, own, own_step, "tokens")
            return launch("cpu.rms_norm", (s, norm_weight), dense.rms_norm, s, norm_weight, scalar), s
        operands = (x, residual, norm_weight)
        return launch("cpu.linear_add_norm", operands, linear_add_norm, x, own, residual, norm_weight, scalar)

    def _adapted(self, x: torch.Tensor, weight: PackedWeight, step: CpuStep, row_set: RowSet) -> torch.Tensor:
        """``x @ W.T + bias`` and the step's adapters; a new contiguous tensor."""
        y = self._operators.project(x, weight)
        return self._operators.adapt(y, x, weight, step, row_set) if step.adapted else y


Norms = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]
"""Weights of the norms of q and k, and eps."""

Place = tuple[HeadMajorKVCache, int, torch.Tensor]
"""Cache, layer, and the rows that keys and values go to."""


def qkv_rope_cache(
    x: torch.Tensor,
    weight: PackedWeight,
    q_heads: int,
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    norms: Norms,
    place: Place,
) -> torch.Tensor:
    """The product, and :func:`rope_cache` of it."""
    return rope_cache(multiply(x, weight), q_heads, head_dim, cos, sin, style, norms, place)


def rope_cache(
    y: torch.Tensor,
    q_heads: int,
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    norms: Norms,
    place: Place,
) -> torch.Tensor:
    """Norm and rotate q and k in place in ``y: [T, n]``, store k and v; returns q, ``[T, heads, head_dim]``."""
    x = y.view(y.shape[0], y.shape[1] // head_dim, head_dim)
    kv, layer, rows = place
    q_norm, k_norm, eps = norms
    end = q_heads + kv.spec.kv_heads
    if q_norm is not None:
        q = x[:, :q_heads]
        q.copy_(dense.rms_norm(q, q_norm, eps))
    if k_norm is not None:
        k = x[:, q_heads:end]
        k.copy_(dense.rms_norm(k, k_norm, eps))
    dense.rotate_(x[:, :end], cos, sin, style)
    stored = x[:, q_heads:]
    kv.store(layer, rows, stored if stored.dtype == kv.spec.dtype else stored.to(kv.spec.dtype))
    return x[:, :q_heads]


def gate_up_act(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """``silu(gate) * up`` of the product's halves."""
    return dense.silu_and_mul(multiply(x, weight))


def linear_add_norm(
    x: torch.Tensor, weight: PackedWeight, residual: torch.Tensor, norm_weight: torch.Tensor, eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(:func:`~polyaccel.backend.cpu.dense.rms_norm` of s, s) with ``s = x @ W.T + bias + residual``, rounded once."""
    s = multiply_add(x, weight, residual)
    return dense.rms_norm(s, norm_weight, eps), s
