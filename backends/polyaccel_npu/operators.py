"""The operators that are no stations. Operands are checked, brought into layout and launched through the guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from polyaccel.backend import KVCache, OperatorError, RopeTable, SampleOutput, SamplingState, Step, Weight
from polyaccel.backend.composite import sampling
from polyaccel.backend.composite.linear import dequantize
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel_npu import check, runtime
from polyaccel_npu.adapter_store import own_store
from polyaccel_npu.attention import Attention
from polyaccel_npu.issue import Issuer
from polyaccel_npu.lora import Lora, groups_of
from polyaccel_npu.lora_cover import covered_lookup
from polyaccel_npu.step import NpuStep
from polyaccel_npu.weight import TableWeight

aten = torch.ops.aten


class NpuOperators:
    """Operators of one backend instance.

    Attributes:
        lora, attention: the parts that stations use as well.
    """

    def __init__(self, issuer: Issuer, lora: Lora | None = None) -> None:
        self._issuer, self._issue, self._tensor = issuer, issuer.issue, issuer.tensor
        self._operands = issuer.operands
        self.lora, self.attention = lora or Lora(issuer), Attention(issuer)

    def table(self) -> Mapping[str, Callable[..., object]]:
        return {
            "embedding": self.embedding,
            "linear": self.linear,
            "dequantize": dequantize,
            "rms_norm": self.rms_norm,
            "layer_norm": self.layer_norm,
            "rotary_embedding": self.rotary_embedding,
            "silu_and_mul": self.silu_and_mul,
            "gelu": self.gelu,
            "select_rows": self.select_rows,
            "write_kv_cache": self.write_kv_cache,
            "paged_attention": self.attention.paged_attention,
            "dense_attention": self.attention.dense_attention,
            "sgmv": self.lora.sgmv,
            "sgmv_shrink": self.lora.sgmv_shrink,
            "sgmv_expand": self.lora.sgmv_expand,
            "sample": self.sample,
        }

    # -- dense -------------------------------------------------------------------------------------------------------

    def embedding(self, weight: Weight, step: Step, vocabulary_start: int) -> torch.Tensor:
        stored, own = check.plain("embedding", weight), NpuStep.of("embedding", step)
        ids, spec = own.tensor("token_ids"), weight.spec
        table, index = self._table(stored, ids, vocabulary_start)
        x = self._tensor("embedding", {"weight": table, "ids": index}, aten.embedding, table, index)
        if not spec.n:
            return x
        return self._adapted_embedding(x, weight, own, ids, vocabulary_start)

    def _table(self, stored: TensorWeight, ids: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The table with rows of zeros about it, and where in it the ids are; other ranks' ids are at those rows."""
        rows, padded = stored.spec.n, stored.padded if isinstance(stored, TableWeight) else None
        if padded is None:
            raise OperatorError("embedding", f"{stored.spec.site!r} was not allocated as a table (lookup=True)")
        operands = {"weight": padded, "ids": ids}
        shifted = self._issue("embedding.shift", operands, aten.add, ids, 1 - start)
        return padded, self._tensor("embedding.clamp", operands, aten.clamp, shifted, 0, rows + 1)

    def _adapted_embedding(
        self, x: torch.Tensor, weight: Weight, step: NpuStep, ids: torch.Tensor, start: int
    ) -> torch.Tensor:
        if step.graph is not None:
            return covered_lookup(self._issuer, x, ids - start, weight, step, step.graph.rank_rows)
        found, spec = step.adapters("tokens"), weight.spec
        if found is None:
            return x
        triples, store = found[0], own_store("embedding", found[1])
        groups = groups_of(store, spec.site, 1, triples) if store.covers(spec.site) else []
        if not groups:
            return x
        rows, _, mixes = step.adapter_tensors("tokens")
        parts = []
        for group in groups:
            picked = slice(group.start, group.end)
            local = ids.index_select(0, rows[picked]) - start
            inside = ((local >= 0) & (local < spec.n)).unsqueeze(1)
            operands = {"a": group.a, "ids": local}
            columns = self._issue(
                "embedding.lookup", operands, aten.index_select, group.a, 1, local.clamp(0, spec.n - 1)
            )
            h = torch.where(inside, columns.t().float(), 0.0)
            weights = triples.weights[picked]
            parts.append(h.contiguous() if bool(np.all(weights == 1.0)) else h * mixes[picked, None])
        total = self.lora.expanded(x, x, parts, groups, weight, step, "tokens")
        return total if total is x else total.to(x.dtype)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        check.rows("linear", "x", x, weight, weight.spec.k)
        if not isinstance(weight, TensorWeight) or weight.spec.experts is not None:
            raise OperatorError("linear", f"takes one matrix of the npu backend, not {weight.spec}")
        if not weight.spec.k or not weight.spec.n:
            return self.product("linear", x, x.new_empty((weight.spec.n, weight.spec.k)), weight.bias)
        return self.product("linear", x, dequantize(weight), weight.bias)

    def product(
        self, operator: str, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ matrix.T + bias`` for ``matrix: [n, k]`` dense."""
        if not x.shape[1] or not matrix.shape[0]:
            y = x.new_zeros((x.shape[0], matrix.shape[0]))
            return y if bias is None else y + bias
        x = self._operands.dense(operator, "x", x)
        transposed = self._operands.transposed(operator, "weight", matrix)
        if bias is None:
            return self._tensor("matmul", {"x": x, "weight": matrix}, aten.mm, x, transposed)
        operands = {"x": x, "weight": matrix, "bias": bias}
        return self._tensor("addmm", operands, aten.addmm, bias, x, transposed)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        check.same_width("rms_norm", {"x": x, "weight": weight, "residual": residual})
        if residual is not None and residual.shape != x.shape:
            raise OperatorError.describe("rms_norm", "x and residual differ in shape", {"x": x, "residual": residual})
        dense, same = self._operands.dense, residual is x
        x, weight = dense("rms_norm", "x", x), dense("rms_norm", "weight", weight)
        if residual is None:
            if not x.numel():
                return torch.empty_like(x)
            operands: dict[str, torch.Tensor | None] = {"x": x, "weight": weight}
            normed, _ = self._issue("rms_norm", operands, runtime.ops().npu_rms_norm, x, weight, eps)
            return _tensor(normed)
        residual = x if same else dense("rms_norm", "residual", residual)
        if not x.numel():
            return torch.empty_like(x), torch.empty_like(x)
        operands = {"x": x, "residual": residual, "weight": weight}
        normed, _, total = self._issue(
            "add_rms_norm", operands, runtime.ops().npu_add_rms_norm, x, residual, weight, eps
        )
        return normed, total

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        check.same_width("layer_norm", {"x": x, "weight": weight, "bias": bias})
        dense = self._operands.dense
        x, weight = dense("layer_norm", "x", x), dense("layer_norm", "weight", weight)
        bias = self._operands.dense_or_none("layer_norm", "bias", bias)
        if not x.numel():
            return torch.empty_like(x)
        operands = {"x": x, "weight": weight, "bias": bias}
        shape = [x.shape[-1]]
        normed, _, _ = self._issue("layer_norm", operands, aten.native_layer_norm, x, shape, weight, bias, eps)
        return _tensor(normed)

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = NpuStep.of("rotary_embedding", step)
        return self.rotated("q", q, rope, own), self.rotated("k", k, rope, own)

    def rotated(self, name: str, x: torch.Tensor, rope: RopeTable, step: NpuStep) -> torch.Tensor:
        """``x: [T, heads, head_dim]`` rotated, of its own dtype. cos and sin are float32 and npu_rotary_mul casts them
        to its input's dtype, so the input is widened: one cast before and one after."""
        tokens = step.input.tokens
        if x.dim() != 3 or x.shape[0] != tokens or x.shape[2] < rope.rotary_dim:
            reason = f"{name} must be [{tokens}, heads, at least {rope.rotary_dim}]"
            raise OperatorError.describe("rotary_embedding", reason, {name: x})
        check.floats("rotary_embedding", **{name: x})
        if not x.numel() or not rope.rotary_dim:
            return x.clone(memory_format=torch.contiguous_format)
        turned = self.rotated_wide(name, x[..., : rope.rotary_dim], rope, step)
        if rope.rotary_dim == x.shape[2]:
            return self.cast(turned, x.dtype)
        rest = x[..., rope.rotary_dim :]
        parts = [self.cast(turned, x.dtype), rest]
        return self._tensor("rotary_embedding.join", {name: rest}, aten.cat, parts, -1)

    def rotated_wide(self, name: str, x: torch.Tensor, rope: RopeTable, step: NpuStep) -> torch.Tensor:
        """``x: [T, heads, rotary_dim]`` rotated, float32."""
        wide = x.float().contiguous() if x.dtype != torch.float32 else self._operands.dense("rotary_embedding", name, x)
        cos, sin = step.angles(rope)
        mode = "half" if rope.style == "half" else "interleave"
        operands = {name: wide, "cos": cos, "sin": sin}
        turned = self._issue(
            "rotary_mul", operands, runtime.ops().npu_rotary_mul, wide.unsqueeze(0), cos, sin, rotary_mode=mode
        )
        result: torch.Tensor = turned
        return result.squeeze(0)

    def cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``x`` in another dtype, dense; x itself where it is of that dtype."""
        if x.dtype == dtype:
            return x
        return self._tensor("cast", {"x": x}, aten._to_copy, x, dtype=dtype, memory_format=torch.contiguous_format)

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or x.shape[1] % 2:
            raise OperatorError.describe("silu_and_mul", "x must be rows of an even width", {"x": x})
        check.floats("silu_and_mul", x=x)
        if not x.numel():
            return x.new_empty((x.shape[0], x.shape[1] // 2))
        x = self._operands.dense("silu_and_mul", "x", x)
        return self._tensor("swiglu", {"x": x}, runtime.ops().npu_swiglu, x, -1)

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        if approximate not in ("none", "tanh"):
            raise OperatorError("gelu", f"approximate is 'none' or 'tanh', not {approximate!r}")
        check.floats("gelu", x=x)
        if not x.numel():
            return torch.empty_like(x)
        x = self._operands.dense("gelu", "x", x)
        return self._tensor("gelu", {"x": x}, runtime.ops().npu_gelu, x, approximate=approximate)

    def select_rows(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        check.floats("select_rows", x=x)
        rows = NpuStep.of("select_rows", step).tensor("logits_rows")
        if len(rows) == x.shape[0]:
            return x
        return self._tensor("select_rows", {"x": x, "rows": rows}, aten.index_select, x, 0, rows)

    # -- attention ---------------------------------------------------------------------------------------------------

    def write_kv_cache(self, k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Step) -> None:
        own, cache = NpuStep.of("write_kv_cache", step), check.cache("write_kv_cache", kv, k=k, v=v)
        tokens = own.input.tokens
        if k.shape != v.shape or k.shape[:2] != (tokens, cache.spec.kv_heads):
            reason = f"k and v must be [{tokens}, {cache.spec.kv_heads}, {cache.spec.head_dim}]"
            raise OperatorError.describe("write_kv_cache", reason, {"k": k, "v": v})
        stored = own.stored()
        if not k.numel() or not len(stored.slots):
            return
        if stored.rows is not None:
            operands: dict[str, torch.Tensor | None] = {"k": k, "rows": stored.rows}
            k = self._issue("write_kv_cache.rows", operands, aten.index_select, k, 0, stored.rows)
            v = self._issue("write_kv_cache.rows", operands, aten.index_select, v, 0, stored.rows)
        dense = self._operands.dense
        k, v = dense("write_kv_cache", "k", k), dense("write_kv_cache", "v", v)
        keys, values = cache.layer(layer)
        operands = {"k": k, "v": v, "key_cache": keys, "value_cache": values, "slots": stored.slots}
        scatter = runtime.ops().npu_scatter_pa_kv_cache
        self._issue("scatter_pa_kv_cache", operands, scatter, k, v, keys, values, stored.slots, cache_mode="Norm")

    # -- sampling ----------------------------------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, state: SamplingState, step: Step) -> SampleOutput:
        check.floats("sample", logits=logits)
        return self._issue("sample", {"logits": logits}, sampling.sample, logits, state, step)


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
