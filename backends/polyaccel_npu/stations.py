"""The stations: what torch_npu has as one operator is one call, and nothing between two is copied for its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from polyaccel.backend import Communicator, KVCache, OperatorError, RopeTable, RowSet, Step, Weight
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel_npu import check
from polyaccel_npu.communicator import NpuCommunicator
from polyaccel_npu.fused import MatmulAllReduce, own_group
from polyaccel_npu.issue import Issuer
from polyaccel_npu.operators import NpuOperators
from polyaccel_npu.step import NpuStep


class NpuStations:
    """Stations of one backend instance. ``groups``: its communicators, oldest first."""

    def __init__(self, issuer: Issuer, operators: NpuOperators, groups: Sequence[NpuCommunicator]) -> None:
        self._issuer, self._operators, self._groups = issuer, operators, groups
        self._fused = MatmulAllReduce(issuer)

    def table(self) -> Mapping[str, Callable[..., object]]:
        return {
            "column_linear": self.column_linear,
            "qkv_rope_cache": self.qkv_rope_cache,
            "gate_up_act": self.gate_up_act,
        }

    def column_linear(self, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
        own = check.plain("column_linear", weight)
        check.rows("column_linear", "x", x, weight, weight.spec.k)
        return self._adapted("column_linear", x, own, NpuStep.of("column_linear", step), row_set)

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
        station = "qkv_rope_cache"
        own, issued = check.plain(station, weight), NpuStep.of(station, step)
        check.rows(station, "x", x, weight, weight.spec.k)
        cache = check.cache(station, kv)
        widths = [part.n for part in own.spec.slices]
        if widths[1:] != [cache.spec.kv_heads * head_dim] * 2 or widths[0] % head_dim or cache.spec.dtype != x.dtype:
            raise OperatorError(station, f"slices {widths} and heads of {head_dim} do not fit {cache.spec}")
        operators = self._operators
        q, k, v = self._heads(station, x, own, issued, head_dim)
        if q_norm is not None:
            q = _tensor(operators.rms_norm(q, q_norm, eps))
        if k_norm is not None:
            k = _tensor(operators.rms_norm(k, k_norm, eps))
        q, k = operators.rotary_embedding(q, k, rope, issued)
        operators.write_kv_cache(k, v, cache, layer, issued)
        return q

    def gate_up_act(self, x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> torch.Tensor:
        own = check.plain("gate_up_act", weight)
        check.rows("gate_up_act", "x", x, weight, weight.spec.k)
        return self._operators.silu_and_mul(
            self._adapted("gate_up_act", x, own, NpuStep.of("gate_up_act", step), "tokens")
        )

    # -- row-parallel ------------------------------------------------------------------------------------------------

    def fused_linear(
        self, x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        """``row_parallel_linear`` as one MatmulAllReduce; the adapters' partial delta enters as x3."""
        station = "row_parallel_linear"
        own, issued = check.plain(station, weight), NpuStep.of(station, step)
        check.rows(station, "x", x, weight, weight.spec.k)
        if not reduce:
            return self._adapted(station, x, own, issued, "tokens")
        group = own_group(station, comm, self._groups)
        # Once for both: the adapters' products take no strided rows either.
        x = self._fused.rows(x)
        delta = self._operators.lora.partial(x, weight, issued, "tokens")
        return self._fused(x, own.tensor, group, own.bias, delta)

    def fused_add_norm(
        self,
        x: torch.Tensor,
        weight: Weight,
        step: Step,
        comm: Communicator,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``row_parallel_add_norm`` as MatmulAllReduce and AddRmsNorm."""
        self._check_residual(x, weight, residual, norm_weight)
        return self._normed(self.fused_linear(x, weight, step, comm), residual, norm_weight, eps)

    def row_parallel_linear(
        self, x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        """A product, adapters added on each rank, then HCCL's sum."""
        station = "row_parallel_linear"
        own, issued = check.plain(station, weight), NpuStep.of(station, step)
        check.rows(station, "x", x, weight, weight.spec.k)
        y = self._adapted(station, x, own, issued, "tokens")
        return comm.all_reduce(y) if reduce and comm.world_size > 1 else y

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
        self._check_residual(x, weight, residual, norm_weight)
        return self._normed(self.row_parallel_linear(x, weight, step, comm), residual, norm_weight, eps)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _adapted(
        self, station: str, x: torch.Tensor, weight: TensorWeight, step: NpuStep, row_set: RowSet
    ) -> torch.Tensor:
        x = self._issuer.operands.dense(station, "x", x)
        y = self._operators.product(station, x, weight.tensor, weight.bias)
        return self._operators.lora.sgmv(y, x, weight, step, row_set)

    def _heads(
        self, station: str, x: torch.Tensor, weight: TensorWeight, step: NpuStep, head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as dense heads: the scatter, the norm and FIA take no strided ones. Without adapters each is a
        product of its own, written where it is wanted; with them the sum in float32 is rounded part by part."""
        x = self._issuer.operands.dense(station, "x", x)
        operators, spec = self._operators, weight.spec
        adapted = operators.lora.added(None, x, weight, step, "tokens")
        parts = []
        for index, (start, part) in enumerate(zip(spec.starts, spec.slices, strict=False)):
            bias = None if weight.bias is None else weight.bias[start : start + part.n]
            y = operators.product(station, x, weight.part(index), bias)
            if adapted is not None:
                delta = adapted[:, start : start + part.n]
                operands = {"y": y, "delta": delta}
                total = self._issuer.issue("sgmv_add", operands, torch.ops.aten.add, delta, y)
                y = operators.cast(total, x.dtype)
            parts.append(y.view(x.shape[0], part.n // head_dim, head_dim))
        return parts[0], parts[1], parts[2]

    def _normed(
        self, y: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self._operators.rms_norm(y, norm_weight, eps, residual)
        assert isinstance(result, tuple)
        return result

    def _check_residual(
        self, x: torch.Tensor, weight: Weight, residual: torch.Tensor, norm_weight: torch.Tensor
    ) -> None:
        check.rows("row_parallel_add_norm", "residual", residual, weight, weight.spec.n)
        given: dict[str, torch.Tensor | None] = {"x": x, "residual": residual, "norm_weight": norm_weight}
        check.same_width("row_parallel_add_norm", {name: given[name] for name in ("residual", "norm_weight")})
        self._issuer.launcher.common_device("npu.row_parallel_add_norm", given)
        if residual.shape[0] != x.shape[0]:
            raise OperatorError.describe(
                "row_parallel_add_norm", "one row of residual a row of x", {"x": x, "residual": residual}
            )


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
