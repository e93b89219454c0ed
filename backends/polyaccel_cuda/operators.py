"""The operators that are no stations. Operands are checked, brought into layout and launched through the guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch

from polyaccel.backend import (
    KVCache,
    Launcher,
    OperatorError,
    RopeTable,
    RowSet,
    SampleOutput,
    SamplingState,
    Step,
    Weight,
)
from polyaccel.backend.composite.linear import dequantize
from polyaccel.backend.ledger import COPY_PREFIX
from polyaccel_cuda import check, sampling
from polyaccel_cuda.kernels import activation, decode, expand, gather, invariant, norm, prefill, rotary, shrink, tiling
from polyaccel_cuda.kernels.few import MOST_ROWS, few_rows
from polyaccel_cuda.kernels.rows import Units
from polyaccel_cuda.kv_cache import BlockMajorKVCache
from polyaccel_cuda.product import product
from polyaccel_cuda.step import CudaStep
from polyaccel_cuda.weight import FoldedWeight

P = ParamSpec("P")
R = TypeVar("R")

# What graphs must ever serve is not known when they are captured; shorter contexts need no more shares than this.
LONG_CONTEXT = 4096


class Issuer:
    """Layout and launches of one backend instance.

    Attributes:
        batch_invariant: every row has the same bits whatever else is in its step.
    """

    def __init__(self, launcher: Launcher, *, batch_invariant: bool = False) -> None:
        self._launcher = launcher
        self.batch_invariant = batch_invariant

    def launch(
        self,
        kernel: str,
        operands: Mapping[str, torch.Tensor | None],
        fn: Callable[P, R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        return self._launcher.launch(f"cuda.{kernel}", operands, fn, *args, **kwargs)

    def dense_rows(self, operator: str, argument: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself if its last dimension is dense, else a copy, which the ledger counts."""
        if x.stride(-1) == 1 or x.shape[-1] <= 1 or not x.numel():
            return x
        self._launcher.ledger.record(f"{COPY_PREFIX}{operator}.{argument}")
        return x.contiguous()

    def contiguous(self, operator: str, argument: str, x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous():
            return x
        self._launcher.ledger.record(f"{COPY_PREFIX}{operator}.{argument}")
        return x.contiguous()

    def multiply(
        self, kernel: str, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ matrix.T + bias`` for dense rows x."""
        operands = {"x": x, "weight": matrix}
        if self.batch_invariant:
            return self.launch(kernel, operands, invariant.product, x, matrix, bias)
        if x.shape[0] <= MOST_ROWS and (x.dtype != torch.float32 or x.shape[0] == 1):
            return self.launch(kernel, operands, few_rows, x, matrix, matrix.shape[0], bias)
        return self.launch(kernel, operands, product, x, matrix, bias)

    def rank_rows(self, x: torch.Tensor, weight: FoldedWeight, step: CudaStep, units: Units) -> torch.Tensor:
        """``[T, rank rows * slices]``: what the step's rank rows alone make of dense rows x."""
        listed, slices = step.listed, len(weight.spec.slices)
        if step.segmented:
            matrix = weight.rank_matrix(weight.spec.rank_rows)
            operands = {"x": x, "weight": matrix}
            share = tiling.INVARIANT_SHRINK if self.batch_invariant else tiling.SHRINK
            return self.launch("sgmv_shrink", operands, shrink.shrink, x, matrix, slices, step.rank_rows, units, share)
        if listed is None:
            return self.multiply("sgmv_shrink", x, weight.rank_matrix(step.rank_rows))
        matrix = weight.rank_matrix(weight.spec.rank_rows)
        return self.listed("sgmv_shrink", x, matrix, 0, None, listed, step.rank_rows, slices)

    def listed(
        self,
        kernel: str,
        x: torch.Tensor,
        matrix: torch.Tensor,
        base: int,
        bias: torch.Tensor | None,
        listed: torch.Tensor,
        covered: int,
        slices: int,
    ) -> torch.Tensor:
        """:func:`few_rows` of dense rows x with the rank rows that a step lists."""
        operands, lone = {"x": x, "weight": matrix, "step": listed}, not self.batch_invariant
        return self.launch(kernel, operands, few_rows, x, matrix, base, bias, listed, covered, slices, lone=lone)


class CudaOperators(Issuer):
    """Operators of one backend instance."""

    def table(self) -> Mapping[str, Callable[..., object]]:
        return {
            "embedding": self.embedding,
            "linear": self.linear,
            "rms_norm": self.rms_norm,
            "layer_norm": self.layer_norm,
            "rotary_embedding": self.rotary_embedding,
            "silu_and_mul": self.silu_and_mul,
            "gelu": self.gelu,
            "select_rows": self.select_rows,
            "write_kv_cache": self.write_kv_cache,
            "paged_attention": self.paged_attention,
            "sgmv": self.sgmv,
            "sgmv_shrink": self.sgmv_shrink,
            "sgmv_expand": self.sgmv_expand,
            "sample": self.sample,
        }

    # -- dense -------------------------------------------------------------------------------------------------------

    def embedding(self, weight: Weight, step: Step, vocabulary_start: int) -> torch.Tensor:
        stored, own = check.table("embedding", weight), CudaStep.of("embedding", step)
        store, units = own.store(), own.units(weight.spec.site, "tokens")
        h = None if store is None or units is None else store.lookup[weight.spec.site]
        ids = own.tensor("token_ids")
        return self.launch(
            "embedding", {"weight": stored, "ids": ids}, gather.embedding, stored, ids, vocabulary_start, h, units
        )

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        if isinstance(weight, FoldedWeight):
            matrix, bias = weight.tensor, weight.bias
        else:
            stored = check.plain("linear", weight)
            matrix, bias = self.launch("dequantize", {"x": x}, dequantize, stored), stored.bias
        check.rows("linear", "x", x, weight, weight.spec.k)
        return self.multiply("linear", self.dense_rows("linear", "x", x), matrix, bias)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        check.same_width("rms_norm", {"x": x, "weight": weight, "residual": residual})
        if residual is not None and residual.shape != x.shape:
            raise OperatorError.describe("rms_norm", "x and residual differ in shape", {"x": x, "residual": residual})
        x = self.dense_rows("rms_norm", "x", x)
        if residual is not None:
            residual = self.dense_rows("rms_norm", "residual", residual)
        weight = self.contiguous("rms_norm", "weight", weight)
        operands = {"x": x, "weight": weight, "residual": residual}
        normed, total = self.launch("rms_norm", operands, norm.rms_norm, x, weight, eps, residual)
        return normed if total is None else (normed, total)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        check.same_width("layer_norm", {"x": x, "weight": weight, "bias": bias})
        x, weight = self.dense_rows("layer_norm", "x", x), self.contiguous("layer_norm", "weight", weight)
        if bias is not None:
            bias = self.contiguous("layer_norm", "bias", bias)
        operands = {"x": x, "weight": weight, "bias": bias}
        return self.launch("layer_norm", operands, norm.layer_norm, x, weight, bias, eps)

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, rope_table: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = CudaStep.of("rotary_embedding", step)
        positions = own.tensor("positions")
        return (
            self._rotate("q", q, rope_table, positions),
            self._rotate("k", k, rope_table, positions),
        )

    def _rotate(self, name: str, x: torch.Tensor, table: RopeTable, positions: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3 or x.shape[0] != len(positions) or x.shape[2] < table.rotary_dim:
            reason = f"{name} must be [{len(positions)}, heads, at least {table.rotary_dim}]"
            raise OperatorError.describe("rotary_embedding", reason, {name: x})
        check.floats("rotary_embedding", **{name: x})
        x = self.dense_rows("rotary_embedding", name, x)
        operands = {name: x, "cos": table.cos, "sin": table.sin, "positions": positions}
        return self.launch("rotary_embedding", operands, rotary.rotate, x, table, positions)

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or x.shape[1] % 2:
            raise OperatorError.describe("silu_and_mul", "x must be rows of an even width", {"x": x})
        check.floats("silu_and_mul", x=x)
        x = self.dense_rows("silu_and_mul", "x", x)
        return self.launch("silu_and_mul", {"x": x}, activation.silu_and_mul, x, x.shape[1] // 2)

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        if approximate not in ("none", "tanh"):
            raise OperatorError("gelu", f"approximate is 'none' or 'tanh', not {approximate!r}")
        check.floats("gelu", x=x)
        x = self.contiguous("gelu", "x", x)
        return self.launch("gelu", {"x": x}, activation.gelu, x, approximate)

    def select_rows(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        own = CudaStep.of("select_rows", step)
        rows = own.tensor("logits_rows")
        if len(rows) == x.shape[0]:
            return x
        return self.launch("select_rows", {"x": x, "rows": rows}, x.index_select, 0, rows)

    # -- attention ---------------------------------------------------------------------------------------------------

    def write_kv_cache(self, k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Step) -> None:
        own, cache = CudaStep.of("write_kv_cache", step), check.cache("write_kv_cache", kv, k=k, v=v)
        k, v = self.dense_rows("write_kv_cache", "k", k), self.dense_rows("write_kv_cache", "v", v)
        slots = own.tensor("kv_slots")
        if k.shape != v.shape or k.shape[:2] != (len(slots), cache.spec.kv_heads):
            reason = f"k and v must be [{len(slots)}, {cache.spec.kv_heads}, {cache.spec.head_dim}]"
            raise OperatorError.describe("write_kv_cache", reason, {"k": k, "v": v})
        stored = cache.layer(layer)
        operands = {"k": k, "v": v, "kv": stored[0], "slots": slots}
        self.launch("write_kv_cache", operands, rotary.write_kv, k, v, stored, slots)

    def queries(self, q: torch.Tensor, kv: KVCache, step: Step) -> tuple[CudaStep, BlockMajorKVCache, torch.Tensor]:
        """Step and cache as this backend's own, and the queries in dense rows."""
        own, cache = CudaStep.of("paged_attention", step), check.cache("paged_attention", kv, q=q)
        if q.shape[0] != own.input.tokens or q.shape[1] % cache.spec.kv_heads:
            reason = f"q must be [{own.input.tokens}, a multiple of {cache.spec.kv_heads}, {cache.spec.head_dim}]"
            raise OperatorError.describe("paged_attention", reason, {"q": q})
        return own, cache, self.dense_rows("paged_attention", "q", q)

    def paged_attention(
        self, q: torch.Tensor, kv: KVCache, layer: int, step: Step, scale: float, window: int | None = None
    ) -> torch.Tensor:
        own, cache, q = self.queries(q, kv, step)
        stored = cache.layer(layer)
        make = torch.empty if own.covered else torch.zeros
        out = make(q.shape, dtype=q.dtype, device=q.device)
        operands = {"q": q, "kv": stored[0], "step": own.tables}
        contexts = own.tensor("context_lengths")
        decodes = own.decodes
        if decodes:
            splits = decode.splits_for(decodes, cache.spec.kv_heads, max(own.longest, LONG_CONTEXT))
            self.launch(
                "decode_attention",
                operands,
                decode.decode,
                q[:decodes],
                stored,
                own.tables,
                own.table_starts[:decodes],
                contexts[:decodes],
                scale,
                window,
                splits,
                out[:decodes],
            )
        tiles = own.tiles
        if len(tiles[0]):
            self.launch(
                "prefill_attention",
                operands,
                prefill.prefill,
                q,
                stored,
                own.tables,
                own.table_starts,
                own.tensor("query_starts"),
                contexts,
                tiles,
                scale,
                window,
                out,
            )
        return out

    # -- adapters ----------------------------------------------------------------------------------------------------

    def sgmv(
        self, y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        own, issued = check.folded("sgmv", weight), CudaStep.of("sgmv", step)
        check.rows("sgmv", "x", x, own, own.spec.k)
        check.rows("sgmv", "y", y, own, own.spec.n)
        units = issued.units(own.spec.site, row_set)
        if units is None:
            return y
        h = self.rank_rows(self.dense_rows("sgmv", "x", x), own, issued, units)
        operands = {"y": y, "h": h, "b": units.b}
        if y.stride(-1) == 1:
            return self.launch("sgmv_expand", operands, expand.expand, y, h, own.spec.starts, units, None, y)
        dense = self.dense_rows("sgmv", "y", y)
        self.launch("sgmv_expand", operands, expand.expand, dense, h, own.spec.starts, units, None, dense)
        return y.copy_(dense)

    def sgmv_shrink(self, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
        own, issued = check.folded("sgmv_shrink", weight), CudaStep.of("sgmv_shrink", step)
        check.rows("sgmv_shrink", "x", x, own, own.spec.k)
        slices, store = len(own.spec.slices), issued.store()
        slots = issued.input.rows(row_set).slots.tolist()
        if store is None or not slots:
            return x.new_zeros((len(slots), slices, 0))
        filled = [where.slot for where in store.ranges() if where is not None]
        width = max((store.true_rank(own.spec.site, i, s) for i in range(slices) for s in filled), default=0)
        if not width:
            return x.new_zeros((len(slots), slices, 0))
        x = self.dense_rows("sgmv_shrink", "x", x)
        u = self.multiply("sgmv_shrink", x, own.rank_matrix(issued.last_rank_row))
        rows, places, _ = issued.adapter_tensors(row_set)
        operands, ranks = {"u": u, "rows": rows}, store.ranks[own.spec.site]
        return self.launch(
            "take_rank_rows", operands, gather.take_rank_rows, u, rows, places, store.spans, ranks, width
        )

    def sgmv_expand(
        self, y: torch.Tensor, h: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        own, issued = check.folded("sgmv_expand", weight), CudaStep.of("sgmv_expand", step)
        check.rows("sgmv_expand", "y", y, own, own.spec.n)
        store = issued.store()
        if store is None or not store.covers(own.spec.site) or not h.numel():
            return y
        h, triples = self.contiguous("sgmv_expand", "h", h), issued.triples(own.spec.site, row_set, store)
        dense = self.dense_rows("sgmv_expand", "y", y)
        b = store.b[own.spec.site]
        operands = {"y": dense, "h": h, "b": b}
        self.launch("sgmv_expand", operands, gather.expand_triples, dense, h, own.spec.starts, b, triples)
        return y if dense is y else y.copy_(dense)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, state: SamplingState, step: Step) -> SampleOutput:
        own = CudaStep.of("sample", step)
        check.floats("sample", logits=logits)
        logits = self.dense_rows("sample", "logits", logits)
        return self.launch("sample", {"logits": logits}, sampling.sample, logits, state, own)
