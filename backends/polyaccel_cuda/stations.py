"""The stations: one product over base and rank rows, and one kernel after it that expands as it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from polyaccel.backend import Communicator, KVCache, OperatorError, RopeTable, RowSet, Step, Weight
from polyaccel_cuda import check, row_parallel
from polyaccel_cuda.kernels import activation, expand, norm, rope, tiling
from polyaccel_cuda.kernels.rows import Units
from polyaccel_cuda.operators import Issuer
from polyaccel_cuda.step import CudaStep
from polyaccel_cuda.weight import FoldedWeight

Adapted = tuple[torch.Tensor, torch.Tensor | None, Units | None]
"""Rows of at least n columns, the rank rows of each, and its adapters; None without any."""


class CudaStations(Issuer):
    """Stations of one backend instance. In a row-parallel layer the rank rows ride on the sum over ranks."""

    def table(self) -> Mapping[str, Callable[..., object]]:
        return {
            "column_linear": self.column_linear,
            "qkv_rope_cache": self.qkv_rope_cache,
            "gate_up_act": self.gate_up_act,
            "row_parallel_linear": self.row_parallel_linear,
            "row_parallel_add_norm": self.row_parallel_add_norm,
        }

    def column_linear(self, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
        own, issued = check.folded("column_linear", weight), CudaStep.of("column_linear", step)
        return self._landed(self._product("column_linear", x, own, issued, row_set), own)

    def qkv_rope_cache(
        self,
        x: torch.Tensor,
        weight: Weight,
        step: Step,
        table: RopeTable,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv: KVCache,
        layer: int,
        head_dim: int,
    ) -> torch.Tensor:
        own, issued = check.folded("qkv_rope_cache", weight), CudaStep.of("qkv_rope_cache", step)
        check.rows("qkv_rope_cache", "x", x, own, own.spec.k)
        cache = check.cache("qkv_rope_cache", kv)
        for name, norm_weight in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm_weight is not None and tuple(norm_weight.shape) != (head_dim,):
                raise OperatorError.describe("qkv_rope_cache", f"{name} must be [{head_dim}]", {name: norm_weight})
        widths = [part.n for part in own.spec.slices]
        heads = (widths[0] // head_dim, cache.spec.kv_heads, head_dim)
        if widths[1:] != [heads[1] * head_dim] * 2 or cache.spec.head_dim != head_dim or cache.spec.dtype != x.dtype:
            raise OperatorError("qkv_rope_cache", f"slices {widths} and heads of {head_dim} do not fit {cache.spec}")
        y, h, units = self._product("qkv_rope_cache", x, own, issued, "tokens")
        if self.batch_invariant or (tiling.QKV_EXPANDS_APART and units is not None and units.largest):
            y, h, units = self._landed((y, h, units), own), None, None
        stored, slots, positions = cache.layer(layer), issued.tensor("kv_slots"), issued.tensor("positions")
        operands = {"x": y, "q_norm": q_norm, "k_norm": k_norm, "rope": table.cos, "kv": stored[0], "step": slots}
        norms = (
            None if q_norm is None else self.contiguous("qkv_rope_cache", "q_norm", q_norm),
            None if k_norm is None else self.contiguous("qkv_rope_cache", "k_norm", k_norm),
            eps,
        )
        return self.launch(
            "rope_cache", operands, rope.rope_cache, y, heads, table, norms, stored, slots, positions, h, units
        )

    def gate_up_act(self, x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> torch.Tensor:
        own, issued = check.folded("gate_up_act", weight), CudaStep.of("gate_up_act", step)
        y, h, units = self._product("gate_up_act", x, own, issued, "tokens")
        if self.batch_invariant:
            y, h, units = self._landed((y, h, units), own), None, None
        return self.launch("silu_and_mul", {"x": y}, activation.silu_and_mul, y, own.spec.n // 2, h, units)

    def row_parallel_linear(
        self, x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        own, issued = check.folded("row_parallel_linear", weight), CudaStep.of("row_parallel_linear", step)
        adapted = row_parallel.by_parts(self, "row_parallel_linear", x, own, issued, comm) if reduce else None
        if adapted is None:
            adapted = self._product("row_parallel_linear", x, own, issued, "tokens")
            if reduce:
                self._sum(adapted, own, issued, comm)
        return self._landed(adapted, own)

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
        own, issued = check.folded("row_parallel_add_norm", weight), CudaStep.of("row_parallel_add_norm", step)
        check.rows("row_parallel_add_norm", "residual", residual, own, own.spec.n)
        check.same_width("row_parallel_add_norm", {"residual": residual, "norm_weight": norm_weight})
        if residual.shape[0] != x.shape[0]:
            raise OperatorError.describe(
                "row_parallel_add_norm", "one row of residual a row of x", {"x": x, "residual": residual}
            )
        residual = self.dense_rows("row_parallel_add_norm", "residual", residual)
        norm_weight = self.contiguous("row_parallel_add_norm", "norm_weight", norm_weight)
        adapted = row_parallel.by_parts(self, "row_parallel_add_norm", x, own, issued, comm)
        if adapted is None:
            adapted = self._product("row_parallel_add_norm", x, own, issued, "tokens")
            if adapted[1] is None and not self.batch_invariant:
                fused = row_parallel.add_and_norm(adapted[0], comm, residual, norm_weight, eps)
                if fused is not None:
                    return fused
            self._sum(adapted, own, issued, comm)
        if self.batch_invariant:
            # With adapters or without, the sum is rounded before the residual is added.
            adapted = (self._landed(adapted, own), None, None)
        y, h, units = adapted
        operands = {"x": y, "residual": residual, "norm_weight": norm_weight}
        if h is None or units is None:
            normed, total = self.launch("rms_norm", operands, norm.rms_norm, y, norm_weight, eps, residual)
            assert total is not None
            return normed, total
        total = self.launch("expand", operands, expand.expand, y, h, own.spec.starts, units, residual)
        normed, _ = self.launch("rms_norm", operands, norm.rms_norm, total, norm_weight, eps)
        return normed, total

    # -- parts -------------------------------------------------------------------------------------------------------

    def _product(self, station: str, x: torch.Tensor, weight: FoldedWeight, step: CudaStep, row_set: RowSet) -> Adapted:
        check.rows(station, "x", x, weight, weight.spec.k)
        x = self.dense_rows(station, "x", x)
        units, whole = step.units(weight.spec.site, row_set), weight.whole
        if units is None:
            return self.multiply("linear", x, weight.tensor, weight.bias), None, None
        if whole is None or step.segmented:
            # First the rank rows, while x is in the cache.
            h = self.rank_rows(x, weight, step, units)
            return self.multiply("linear", x, weight.tensor, weight.bias), h, units
        listed = step.listed
        if listed is None:
            y = self.multiply("linear", x, *weight.covering(step.rank_rows))
        else:
            slices = len(weight.spec.slices)
            y = self.listed("linear", x, whole, weight.n_padded, weight.bias, listed, step.rank_rows, slices)
        return y, y[:, weight.n_padded :], units

    def _landed(self, adapted: Adapted, weight: FoldedWeight) -> torch.Tensor:
        y, h, units = adapted
        if h is None or units is None:
            return y
        return self.launch("expand", {"x": y}, expand.expand, y, h, weight.spec.starts, units)

    def _sum(self, adapted: Adapted, weight: FoldedWeight, step: CudaStep, comm: Communicator) -> None:
        if comm.world_size > 1:
            y, h, _ = adapted
            n, rank_rows = weight.spec.n, weight.spec.rank_rows
            apart = step.segmented or not weight.folded or weight.n_padded > n
            if h is not None and (apart or h.shape[1] > rank_rows):
                # Widths that are no multiple of vectors: what lies between and behind is no part of the sum.
                parts = (y[:, :n], h[:, :rank_rows])
                message = self.launch("pack", {"y": y, "h": h}, _packed, *parts)
                comm.all_reduce(message)
                self.launch("unpack", {"y": y, "h": h, "message": message}, _unpacked, message, *parts)
            else:
                # The rank rows are columns of the same tensor: they ride along.
                comm.all_reduce(y)


def _packed(y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Both side by side, dense."""
    message = y.new_empty((y.shape[0], y.shape[1] + h.shape[1]))
    message[:, : y.shape[1]].copy_(y)
    message[:, y.shape[1] :].copy_(h)
    return message


def _unpacked(message: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> None:
    y.copy_(message[:, : y.shape[1]])
    h.copy_(message[:, y.shape[1] :])
