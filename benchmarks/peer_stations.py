"""A model's stations as others would build them: products by cuBLAS, adapters by vLLM's kernels, all else the same.

What comes after a product, rotation and KV write, activation, residual and norm, are this project's own kernels
without adapters: two models then differ in nothing but how they multiply and how they add adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cuda_model import EPS, Model
from torch.nn.functional import linear
from vllm_lora import Rows, VllmLora

from polyaccel.backend import Step
from polyaccel_cuda.kernels import activation, norm, rope


class VllmAdapters:
    """The adapters of a model, in the form of vLLM's kernels: of each site and slice one tensor of all slots."""

    def __init__(self, model: Model, lora: VllmLora, *, slots: int, rank: int) -> None:
        self.lora, self._model, self._rank = lora, model, rank
        self._device = model.device.torch_device
        self._a: dict[str, list[torch.Tensor]] = {}
        self._b: dict[str, list[torch.Tensor]] = {}
        for site, weight in model.weights.items():
            if not weight.spec.rank_rows:
                continue
            k, parts = weight.spec.k, weight.spec.slices
            self._a[site] = [self._zeros(slots, rank, k) for _ in parts]
            self._b[site] = [self._zeros(slots, part.n, rank) for part in parts]

    def load(self, slot: int) -> None:
        packed = self._model.adapter(slot, self._rank)
        for entry in packed.entries:
            a, b = self._a[entry.site][entry.slice][slot], self._b[entry.site][entry.slice][slot]
            a.view(-1).copy_(packed.buffer[entry.a_offset : entry.a_offset + a.numel()])
            b.view(-1).copy_(packed.buffer[entry.b_offset : entry.b_offset + b.numel()])

    def rows(self, slots: Sequence[int]) -> Rows:
        return self.lora.rows(slots, self._device)

    def add(self, site: str, y: torch.Tensor, x: torch.Tensor, rows: Rows) -> None:
        if site in self._a:
            self.lora.add(y, x, self._a[site], self._b[site], rows)

    def close(self) -> None:
        self._a.clear()
        self._b.clear()
        self.lora.forget()

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._model.dtype, device=self._device)


class PeerStations:
    """cuBLAS as torch uses it by default; ``adapters``: those of the rows, whose slots ``rows`` says."""

    def __init__(self, model: Model, adapters: VllmAdapters | None = None, rows: Rows | None = None) -> None:
        self._model, self._adapters, self._rows = model, adapters, rows

    def qkv(self, x: torch.Tensor, layer: int, step: Step) -> torch.Tensor:
        shape = self._model.shape
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        slots, positions = step.tensor("kv_slots"), step.tensor("positions")
        cache: Any = self._model.kv
        y = self._linear(x, f"{layer}.qkv")
        return rope.rope_cache(y, heads, self._model.rope, (None, None, EPS), cache.layer(layer), slots, positions)

    def add_norm(
        self, x: torch.Tensor, site: str, step: Step, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = norm.rms_norm(self._linear(x, site), self._model.norm, EPS, residual)
        assert total is not None
        return normed, total

    def gate_up(self, x: torch.Tensor, layer: int, step: Step) -> torch.Tensor:
        return activation.silu_and_mul(self._linear(x, f"{layer}.gate_up"), self._model.shape.ffn)

    def head(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        return self._linear(x, "lm_head")

    def _linear(self, x: torch.Tensor, site: str) -> torch.Tensor:
        weight: Any = self._model.weights[site]
        y = linear(x, weight.tensor)
        if self._adapters is not None and self._rows is not None:
            self._adapters.add(site, y, x, self._rows)
        return y
