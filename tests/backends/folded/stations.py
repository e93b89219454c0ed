"""The stations, fused: one kernel each, or one before the sum over ranks and one after it."""

from __future__ import annotations

import torch

from polyaccel.backend import Communicator, KVCache, RopeTable, RowSet, Step, Weight
from polyaccel.backend.composite import dense

from . import kernels
from .issue import (
    Issuer,
    adapted,
    folded_cache,
    issued_step,
    landed,
    norms_for,
    queued,
    rank_rows_of,
    rows_for,
    same_width,
)
from .step import FoldedStep, RunningStep
from .weight import FoldedWeight, folded


class FoldedStations(Issuer):
    """Products give y and h together. Before a sum over ranks h is not expanded: it rides along."""

    def column_linear(self, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
        own, issued = folded("column_linear", weight), issued_step(step)
        rows_for("column_linear", x, own)
        y = self._device.empty((x.shape[0], own.spec.n), x.dtype)
        self._launch("column_linear", (x, own.buffer, y), lambda: y.copy_(adapted(x, own, issued, row_set)))
        return y

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
        own, issued, cache = folded("qkv_rope_cache", weight), issued_step(step), folded_cache(kv)
        rows_for("qkv_rope_cache", x, own)
        norms_for("qkv_rope_cache", head_dim, x.dtype, q_norm=q_norm, k_norm=k_norm)
        widths = [part.n for part in own.spec.slices]
        out = self._device.empty((x.shape[0], widths[0] // head_dim, head_dim), x.dtype)

        def run() -> None:
            y = adapted(x, own, issued, "tokens").to(x.dtype)
            q, k, v = (
                part.reshape(part.shape[0], part.shape[1] // head_dim, head_dim)
                for part in torch.split(y, widths, dim=-1)
            )
            if q_norm is not None and k_norm is not None:
                q, k = kernels.rms_norm(q, q_norm, eps), kernels.rms_norm(k, k_norm, eps)
            q, k = dense.rotary_embedding(q, k, rope, RunningStep(issued))
            cache.store(layer, issued.tensor("kv_slots"), k, v)
            out.copy_(q)

        self._launch("qkv_rope_cache", (x, own.buffer, q_norm, k_norm, rope.cos, out), run)
        return out

    def gate_up_act(self, x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> torch.Tensor:
        own, issued = folded("gate_up_act", weight), issued_step(step)
        rows_for("gate_up_act", x, own)
        y = self._device.empty((x.shape[0], own.spec.slices[0].n), x.dtype)

        def run() -> None:
            y.copy_(dense.silu_and_mul(adapted(x, own, issued, "tokens").to(x.dtype)))

        self._launch("gate_up_act", (x, own.buffer, y), run)
        return y

    def row_parallel_linear(
        self, x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        own, issued = folded("row_parallel_linear", weight), issued_step(step)
        rows_for("row_parallel_linear", x, own)
        message = self._message(x, own, issued)
        if reduce:
            self._summed(message, comm)
        y = self._device.empty((x.shape[0], own.spec.n), x.dtype)
        self._launch("expand", (message, y), lambda: y.copy_(landed(message, own, issued)))
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
        own, issued = folded("row_parallel_add_norm", weight), issued_step(step)
        rows_for("row_parallel_add_norm", x, own)
        same_width("row_parallel_add_norm", {"residual": residual, "norm_weight": norm_weight})
        message = self._message(x, own, issued)
        self._summed(message, comm)
        normed, total = self._device.empty(residual.shape, x.dtype), self._device.empty(residual.shape, x.dtype)

        def run() -> None:
            y = landed(message, own, issued).to(x.dtype)
            results = dense.rms_norm(y, norm_weight, eps, residual)
            normed.copy_(results[0])
            total.copy_(results[1])

        self._launch("expand_add_norm", (message, residual, norm_weight, normed, total), run)
        return normed, total

    def _message(self, x: torch.Tensor, weight: FoldedWeight, step: FoldedStep) -> torch.Tensor:
        """``[T, n + rank rows * slices]``: this rank's part of y with the rank rows that ride along."""
        spec, rank_rows = weight.spec, rank_rows_of(weight, step)
        message = self._device.empty((x.shape[0], spec.n + rank_rows * len(spec.slices)), x.dtype)

        def run() -> None:
            y, h = kernels.product(x, weight, rank_rows)
            message.copy_(torch.cat((y, h.flatten(1)), dim=1))

        self._launch("row_parallel_product", (x, weight.buffer, message), run)
        return message

    def _summed(self, message: torch.Tensor, comm: Communicator) -> None:
        if comm.world_size > 1:
            queued(comm).all_reduce(message)
