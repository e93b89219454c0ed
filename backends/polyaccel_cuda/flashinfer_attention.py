"""``paged_attention`` by FlashInfer's wrappers where a step is planned for them, else by this backend's kernels."""

from __future__ import annotations

import torch

from polyaccel.backend import KVCache, Launcher, Step
from polyaccel.backend.ledger import COPY_PREFIX
from polyaccel_cuda.flashinfer_plan import Call, Planner, Variant
from polyaccel_cuda.operators import CudaOperators
from polyaccel_cuda.step import CudaStep

ALIGNMENT = 16
"""Bytes of which a head of q begins at a multiple: it is read in vectors."""


class FlashInferOperators(CudaOperators):
    """The operators with FlashInfer's attention."""

    def __init__(self, launcher: Launcher, planner: Planner) -> None:
        super().__init__(launcher)
        self._planner = planner

    def paged_attention(
        self, q: torch.Tensor, kv: KVCache, layer: int, step: Step, scale: float, window: int | None = None
    ) -> torch.Tensor:
        calls = self._calls(q, kv, step, scale, window)
        if not calls:
            return super().paged_attention(q, kv, layer, step, scale, window)
        own, cache, dense = self.queries(q, kv, step)
        dense, stored = self._aligned(dense), cache.layer(layer)
        make = torch.empty if own.covered else torch.zeros
        out = make(q.shape, dtype=q.dtype, device=q.device)
        operands = {"q": dense, "kv": stored[0], "step": own.tables}
        for call in calls:
            rows = slice(call.begin, call.end)
            self.launch(f"flashinfer_{call.kind}", operands, call.wrapper.run, dense[rows], stored, out=out[rows])
        return out

    def _calls(self, q: torch.Tensor, kv: KVCache, step: Step, scale: float, window: int | None) -> tuple[Call, ...]:
        own = CudaStep.of("paged_attention", step)
        if kv is not own.state.kv or q.dim() != 3:
            return ()
        return self._planner.calls(own, Variant.of(kv.spec, q.shape[1], scale, window))

    def _aligned(self, q: torch.Tensor) -> torch.Tensor:
        """``q`` itself if its heads begin where vectors may, else a copy, which the ledger counts."""
        steps = (q.stride(0), q.stride(1), q.storage_offset())
        if all(step * q.element_size() % ALIGNMENT == 0 for step in steps) and q.data_ptr() % ALIGNMENT == 0:
            return q
        self._launcher.ledger.record(f"{COPY_PREFIX}paged_attention.q")
        return q.clone(memory_format=torch.contiguous_format)
