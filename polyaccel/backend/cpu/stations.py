"""The CPU backend's stations: what lies between two products of a layer, in as few passes as torch allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.cpu import dense
from polyaccel.backend.cpu.kv_cache import HeadMajorKVCache
from polyaccel.backend.cpu.linear import check_rows, multiply, multiply_add
from polyaccel.backend.cpu.operators import CpuOperators
from polyaccel.backend.cpu.step import CpuStep, own_cache
from polyaccel.backend.cpu.weight import PackedWeight
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.guard import Launcher
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.rope import RopeStyle, RopeTable
from polyaccel.backend.step import RowSet, Step
from polyaccel.backend.weight import Weight


class CpuStations:
    """Stations of one backend instance.

    A station is one launch. Adapters are one more before it, whose result the product adds; those of prefill, and of
    narrower dtypes, are added between the station's parts.
    """

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
        own, x, own_step = self._operands("column_linear", x, weight, step)
        return self._product(x, own, own_step, row_set)

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
        own, x, own_step = self._operands("qkv_rope_cache", x, weight, step)
        cache = own_cache("qkv_rope_cache", kv)
        cos, sin = own_step.rope_rows(rope)
        q_heads, scalar = own.spec.slices[0].n // head_dim, self._operators.scalar(eps)
        heads = Heads(q_heads, head_dim, cos, sin, rope.style, q_norm, k_norm, scalar)
        place = (cache, layer, own_step.kv_rows(cache))
        if own_step.adapted and not self._operators.adds_by_product(x, own_step, "tokens"):
            y = self._product(x, own, own_step, "tokens")
            return self._launch("cpu.rope_cache", (y, cos, sin, q_norm, k_norm), rope_cache, y, heads, place)
        extra = self._operators.delta(x, own, own_step, "tokens") if own_step.adapted else None
        operands = (x, cos, sin, q_norm, k_norm, extra)
        return self._launch("cpu.qkv_rope_cache", operands, qkv_rope_cache, x, own, extra, heads, place)

    def gate_up_act(self, x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> torch.Tensor:
        own, x, own_step = self._operands("gate_up_act", x, weight, step)
        if own_step.adapted and not self._operators.adds_by_product(x, own_step, "tokens"):
            return self._operators.silu_and_mul(self._product(x, own, own_step, "tokens"))
        extra = self._operators.delta(x, own, own_step, "tokens") if own_step.adapted else None
        return self._launch("cpu.gate_up_act", (x, extra), gate_up_act, x, own, extra)

    def row_parallel_linear(
        self, x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        own, x, own_step = self._operands("row_parallel_linear", x, weight, step)
        y = self._product(x, own, own_step, "tokens")
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
        if residual.shape != (*x.shape[:-1], weight.spec.n) or residual.dtype != x.dtype:
            # Found out later, the residual would have been added to already.
            raise OperatorError.describe(
                "row_parallel_add_norm",
                f"residual must be {x.dtype} rows of {weight.spec.n}, one a row of x",
                {"x": x, "residual": residual},
            )
        if comm.world_size > 1:
            y = self.row_parallel_linear(x, weight, step, comm)
            parts: tuple[torch.Tensor | None, ...] = (y, residual, norm_weight)
            return launch("cpu.add_rms_norm", parts, dense.add_rms_norm, y, residual, norm_weight, scalar)
        own, x, own_step = self._operands("row_parallel_add_norm", x, weight, step)
        residual = operators.contiguous("row_parallel_add_norm", "residual", residual)
        if own_step.adapted and not operators.adds_by_product(x, own_step, "tokens"):
            s = launch("cpu.linear_add", (x, residual), multiply_add, x, own, residual)
            s = operators.adapt(s, x, own, own_step, "tokens")
            return launch("cpu.rms_norm", (s, norm_weight), dense.rms_norm, s, norm_weight, scalar), s
        extra = operators.delta(x, own, own_step, "tokens") if own_step.adapted else None
        parts = (x, residual, norm_weight, extra)
        return launch("cpu.linear_add_norm", parts, linear_add_norm, x, own, extra, residual, norm_weight, scalar)

    def _operands(
        self, station: str, x: torch.Tensor, weight: Weight, step: Step
    ) -> tuple[PackedWeight, torch.Tensor, CpuStep]:
        own = check_rows(station, x, weight)
        return own, self._operators.contiguous(station, "x", x), CpuStep.of(station, step)

    def _product(self, x: torch.Tensor, weight: PackedWeight, step: CpuStep, row_set: RowSet) -> torch.Tensor:
        """``x @ W.T + bias`` and the step's adapters; a new contiguous tensor."""
        operators = self._operators
        if not step.adapted:
            return operators.project(x, weight)
        if not operators.adds_by_product(x, step, row_set):
            return operators.adapt(operators.project(x, weight), x, weight, step, row_set)
        extra = operators.delta(x, weight, step, row_set)
        if extra is None:
            return operators.project(x, weight)
        return self._launch("cpu.linear_add", (x, extra), multiply_add, x, weight, extra)


class Heads(NamedTuple):
    """How a row falls into heads, and what happens to those of q and k."""

    q_heads: int
    head_dim: int
    cos: torch.Tensor
    sin: torch.Tensor
    style: RopeStyle
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: torch.Tensor


Place = tuple[HeadMajorKVCache, int, torch.Tensor]
"""Cache, layer, and the rows that keys and values go to."""


def qkv_rope_cache(
    x: torch.Tensor, weight: PackedWeight, extra: torch.Tensor | None, heads: Heads, place: Place
) -> torch.Tensor:
    """:func:`rope_cache` of the product and what is to be added to it."""
    return rope_cache(multiply(x, weight) if extra is None else multiply_add(x, weight, extra), heads, place)


def rope_cache(y: torch.Tensor, heads: Heads, place: Place) -> torch.Tensor:
    """Norm and rotate q and k in place in ``y: [T, n]``, store k and v; returns q, ``[T, heads, head_dim]``."""
    q_heads, head_dim, cos, sin, style, q_norm, k_norm, eps = heads
    kv, layer, rows = place
    x = y.view(y.shape[0], y.shape[1] // head_dim, head_dim)
    end = q_heads + kv.spec.kv_heads
    turned = x[:, :end]
    if q_norm is not None and k_norm is not None:
        weights = torch.cat((q_norm.expand(q_heads, -1), k_norm.expand(kv.spec.kv_heads, -1)))
        dense.rms_norm_(turned, weights, eps)
    elif q_norm is not None:
        dense.rms_norm_(x[:, :q_heads], q_norm, eps)
    elif k_norm is not None:
        dense.rms_norm_(x[:, q_heads:end], k_norm, eps)
    dense.rotate_(turned, cos, sin, style)
    stored = x[:, q_heads:]
    kv.store(layer, rows, stored if stored.dtype == kv.spec.dtype else stored.to(kv.spec.dtype))
    return x[:, :q_heads]


def gate_up_act(x: torch.Tensor, weight: PackedWeight, extra: torch.Tensor | None) -> torch.Tensor:
    """``silu(gate) * up`` of the halves of the product and what is to be added to it."""
    return dense.silu_and_mul(multiply(x, weight) if extra is None else multiply_add(x, weight, extra))


def linear_add_norm(
    x: torch.Tensor,
    weight: PackedWeight,
    extra: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(:func:`~polyaccel.backend.cpu.dense.rms_norm` of s, s) with ``s = x @ W.T + bias + residual + extra``."""
    s = multiply_add(x, weight, residual if extra is None else extra.add_(residual))
    return dense.rms_norm(s, norm_weight, eps), s
