"""The operators that are no stations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend import (
    Communicator,
    KVCache,
    OperatorError,
    RopeTable,
    RowSet,
    SampleOutput,
    SamplingState,
    Step,
    Weight,
)
from polyaccel.backend.composite import dense, moe, sampling

from . import kernels
from .issue import (
    Issuer,
    choices_for,
    expanded,
    folded_cache,
    heads_for,
    issued_step,
    queued,
    rank_rows_of,
    rows_for,
    same_width,
    store_of,
)
from .sampling_state import FoldedSamplingState
from .step import FoldedStep, RunningStep
from .weight import folded

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class FoldedOperators(Issuer):
    """Each is one kernel; the arithmetic of some is that of the plain-torch forms, run when its turn comes."""

    def embedding(self, weight: Weight, step: Step, vocabulary_start: int) -> torch.Tensor:
        own, issued = folded("embedding", weight), issued_step(step)
        x = self._device.empty((issued.extent.tokens, own.spec.k), own.spec.dtype)
        rank_rows = rank_rows_of(own, issued)

        def run() -> None:
            y, h = kernels.lookup(issued.tensor("token_ids") - vocabulary_start, own, rank_rows)
            x.copy_(expanded(y, h, own, issued, "tokens"))

        self._launch("embedding", (own.buffer, x), run)
        return x

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        own = folded("linear", weight)
        rows_for("linear", x, own)
        y = self._device.empty((x.shape[0], own.spec.n), x.dtype)
        self._launch("linear", (x, own.buffer, y), lambda: y.copy_(kernels.product(x, own)[0]))
        return y

    def sgmv(
        self, y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        own, issued = folded("sgmv", weight), issued_step(step)
        rows_for("sgmv", x, own)
        if y.dim() != 2 or y.shape[1] != own.spec.n or y.dtype != x.dtype:
            raise OperatorError.describe("sgmv", f"{own.spec.site!r} gives rows of {own.spec.n}", {"y": y})

        def run() -> None:
            h = kernels.product(x, own, rank_rows_of(own, issued))[1]
            y.copy_(expanded(y.float(), h, own, issued, row_set))

        self._launch("sgmv", (y, x, own.buffer), run)
        return y

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        same_width("rms_norm", {"x": x, "weight": weight, "residual": residual})
        outputs = [self._device.empty(x.shape, x.dtype) for _ in range(1 if residual is None else 2)]

        def run() -> None:
            result = dense.rms_norm(x, weight, eps, residual)
            for output, part in zip(outputs, result if isinstance(result, tuple) else (result,), strict=True):
                output.copy_(part)

        self._launch("rms_norm", (x, weight, residual, *outputs), run)
        return outputs[0] if residual is None else (outputs[0], outputs[1])

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        issued = issued_step(step)
        out_q, out_k = self._device.empty(q.shape, q.dtype), self._device.empty(k.shape, k.dtype)

        def run() -> None:
            turned = dense.rotary_embedding(q, k, rope, RunningStep(issued))
            out_q.copy_(turned[0])
            out_k.copy_(turned[1])

        self._launch("rotary_embedding", (q, k, rope.cos, out_q, out_k), run)
        return out_q, out_k

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        y = self._device.empty((x.shape[0], x.shape[1] // 2), x.dtype)
        self._launch("silu_and_mul", (x, y), lambda: y.copy_(dense.silu_and_mul(x)))
        return y

    def select_rows(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        issued = issued_step(step)
        y = self._device.empty((issued.extent.rows, x.shape[1]), x.dtype)
        self._launch("select_rows", (x, y), lambda: y.copy_(x[issued.tensor("logits_rows").long()]))
        return y

    def write_kv_cache(self, k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Step) -> None:
        issued, cache = issued_step(step), folded_cache(kv)
        heads_for("write_kv_cache", cache, k=k, v=v)
        self._launch("write_kv_cache", (k, v), lambda: cache.store(layer, issued.tensor("kv_slots"), k, v))

    def paged_attention(
        self, q: torch.Tensor, kv: KVCache, layer: int, step: Step, scale: float, window: int | None = None
    ) -> torch.Tensor:
        issued, cache = issued_step(step), folded_cache(kv)
        heads_for("paged_attention", cache, q=q)
        out = self._device.empty(q.shape, q.dtype)

        def run() -> None:
            starts, contexts = issued.tensor("query_starts").tolist(), issued.tensor("context_lengths").tolist()
            tables = issued.tensor("block_tables")
            out.copy_(kernels.attention(q, cache, layer, starts, contexts, tables, scale, window))

        self._launch("paged_attention", (q, out), run)
        return out

    def moe_route(
        self,
        logits: torch.Tensor,
        top_k: int,
        scoring: str,
        renormalise: bool,
        bias: torch.Tensor | None = None,
        groups: int = 1,
        topk_groups: int = 1,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.dim() != 2 or logits.dtype not in FLOATS:
            raise OperatorError.describe("moe_route", "logits are not [tokens, experts] floats", {"logits": logits})
        if bias is not None and bias.shape != logits.shape[1:]:
            raise OperatorError.describe("moe_route", "bias is not [experts]", {"logits": logits, "bias": bias})
        weights = self._device.empty((logits.shape[0], top_k), torch.float32)
        ids = self._device.empty((logits.shape[0], top_k), torch.int32)

        def run() -> None:
            routed = moe.moe_route(logits, top_k, scoring, renormalise, bias, groups, topk_groups, scale)
            weights.copy_(routed[0])
            ids.copy_(routed[1])

        self._launch("moe_route", (logits, bias, weights, ids), run)
        return weights, ids

    def moe_experts(
        self,
        x: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        ids: torch.Tensor,
        weights: torch.Tensor,
        step: Step,
        act: str = "silu",
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        first, second, issued = folded("moe_experts", gate_up), folded("moe_experts", down), issued_step(step)
        y = self._device.empty((x.shape[0], second.spec.n), x.dtype)
        rows_for("moe_experts", x, first)
        choices_for("moe_experts", x, ids, weights)
        store, mix = store_of(issued), issued.buffers.mix["tokens"][: x.shape[0]]

        def run() -> None:
            local = ids.long() if expert_map is None else expert_map[ids.long()].long()
            y.copy_(kernels.experts(x, first, second, local, weights, mix, issued.rank_rows, store))

        self._launch("moe_experts", (x, first.buffer, second.buffer, ids, weights, y), run)
        return y

    def dequantize(self, weight: Weight) -> torch.Tensor:
        return folded("dequantize", weight).dense()

    def sample(self, logits: torch.Tensor, state: SamplingState, step: Step) -> SampleOutput:
        issued, rows = issued_step(step), logits.shape[0]
        if not isinstance(state, FoldedSamplingState):
            raise OperatorError("sample", f"takes a FoldedSamplingState, not {type(state).__name__}")
        ids = self._device.empty((rows,), torch.int64)
        scores = self._logprob_outputs(rows, state, issued)

        def run() -> None:
            result = sampling.sample(logits, state.tensors, RunningStep(issued))
            ids.copy_(result.ids)
            for output, part in zip(scores, (result.logprobs, result.top_ids, result.top_logprobs), strict=False):
                if part is not None:
                    output.copy_(part)

        self._launch("sample", (logits, ids), run)
        return SampleOutput(ids=ids, **dict(zip(("logprobs", "top_ids", "top_logprobs"), scores, strict=False)))

    def _logprob_outputs(self, rows: int, state: FoldedSamplingState, step: FoldedStep) -> Sequence[torch.Tensor]:
        # A graph has them always: which requests it will be replayed for is not known.
        if not self._device.queue.recording and not state.wants_logprobs(step.input.sample_slots):
            return ()
        most, empty = state.spec.max_top_logprobs, self._device.empty
        return (
            empty((rows,), torch.float32),
            empty((rows, most), torch.int64),
            empty((rows, most), torch.float32),
        )

    def all_reduce(self, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        return self._launcher.launch("folded.all_reduce", (x,), queued(comm).all_reduce, x)

    def all_gather(self, x: torch.Tensor, comm: Communicator, dim: int = -1) -> torch.Tensor:
        return self._launcher.launch("folded.all_gather", (x,), queued(comm).all_gather, x, dim)
