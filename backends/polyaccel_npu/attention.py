"""Attention by npu_fused_infer_attention_score (FIA), over the paged cache and inside segments.

Layout BSND throughout: TND is documented for heads of 128 and 192 alone. Sequences with one query are one call, a
sequence that is prefilled is one. Masks are CANN's optimised ones, a triangle of 2048 that serves every length: mode 3
ends the triangle at the last query and the last key, mode 4 adds a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from polyaccel.backend import KVCache, OperatorError, Step
from polyaccel_npu import check, runtime
from polyaccel_npu.attention_plan import Call
from polyaccel_npu.issue import Issuer
from polyaccel_npu.kv_cache import BlockKVCache
from polyaccel_npu.step import GraphMode, NpuStep

TRIANGLE = 2048
ALL_KEYS, CAUSAL, BAND = 0, 3, 4
"""Sparse modes."""


class Attention:
    """Of one backend instance; holds one mask a device."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._triangles: dict[torch.device, torch.Tensor] = {}

    def paged_attention(
        self, q: torch.Tensor, kv: KVCache, layer: int, step: Step, scale: float, window: int | None = None
    ) -> torch.Tensor:
        own, cache = NpuStep.of("paged_attention", step), check.cache("paged_attention", kv, q=q)
        if q.shape[0] != own.input.tokens or q.shape[1] % cache.spec.kv_heads:
            reason = f"q must be [{own.input.tokens}, a multiple of {cache.spec.kv_heads}, {cache.spec.head_dim}]"
            raise OperatorError.describe("paged_attention", reason, {"q": q})
        q = self._issuer.operands.dense("paged_attention", "q", q)
        if own.graph is not None:
            return self._recorded(q, cache, layer, own, own.graph, scale, window)
        plan = own.attention()
        parts: list[torch.Tensor] = []
        for zeros, call in plan.gaps():
            if zeros:
                parts.append(q.new_zeros((zeros, *q.shape[1:])))
            if call is not None:
                parts.append(self._call(q, cache, layer, own, call, scale, window))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return torch.empty_like(q)
        return self._issuer.tensor("paged_attention.join", {"q": q}, torch.ops.aten.cat, parts, 0)

    def _call(
        self,
        q: torch.Tensor,
        cache: BlockKVCache,
        layer: int,
        step: NpuStep,
        call: Call,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        keys, values = cache.paged(layer)
        rows, heads = q[call.begin : call.end], q.shape[1]
        tables = step.tables[call.first : call.last]
        size, longest = cache.spec.block_size, max(call.lengths)
        mask: torch.Tensor | None = None
        mode, before = ALL_KEYS, 2147483647
        if call.decodes:
            query = rows.unsqueeze(1)
            if window is not None and window < longest:
                mask = step.window_mask(call.first, call.last, window, tables.shape[1] * size)
        else:
            query = rows.unsqueeze(0)
            mode, mask = CAUSAL, self._triangle(q.device)
            if window is not None and window < longest:
                mode, before = BAND, window - 1
        operands = {"q": query, "keys": keys, "values": values, "block_table": tables, "mask": mask}
        result, _ = self._issuer.issue(
            "fused_infer_attention_score",
            operands,
            runtime.ops().npu_fused_infer_attention_score,
            query,
            keys,
            values,
            atten_mask=mask,
            actual_seq_lengths=None if call.decodes else [call.end - call.begin],
            actual_seq_lengths_kv=list(call.lengths),
            block_table=tables,
            num_heads=heads,
            scale=scale,
            pre_tokens=before,
            next_tokens=0 if mode == BAND else 2147483647,
            input_layout="BSND",
            num_key_value_heads=cache.spec.kv_heads,
            sparse_mode=mode,
            block_size=size,
        )
        attended: torch.Tensor = result
        return attended.view(call.end - call.begin, heads, q.shape[2])

    def _recorded(
        self,
        q: torch.Tensor,
        cache: BlockKVCache,
        layer: int,
        step: NpuStep,
        graph: GraphMode,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """One call for all rows, each a sequence, whose lengths the host may change before each replay. Its result and
        its workspace are made before it is issued: calls that replace it must write where it writes."""
        keys, values = cache.paged(layer)
        query, tables, ops = q.unsqueeze(1), step.tables, runtime.ops()
        mask = None
        if window is not None and window < step.capacity:
            mask = step.window_mask(0, len(q), window, step.capacity)
        fixed = {
            "atten_mask": mask,
            "block_table": tables,
            "num_heads": q.shape[1],
            "scale": scale,
            "input_layout": "BSND",
            "num_key_value_heads": cache.spec.kv_heads,
            "sparse_mode": ALL_KEYS,
            "block_size": cache.spec.block_size,
        }
        operands = {"q": query, "keys": keys, "values": values, "block_table": tables, "mask": mask}
        out, lse = torch.empty_like(query), torch.empty(1, dtype=torch.float32, device=q.device)
        most = ops._npu_fused_infer_attention_score_get_max_workspace
        workspace = most(query, keys, values, actual_seq_lengths_kv=list(graph.host.lengths), **fixed)

        def issue(lengths: list[int]) -> object:
            given = {**fixed, "actual_seq_lengths_kv": lengths, "workspace": workspace, "out": [out, lse]}
            return ops.npu_fused_infer_attention_score.out(query, keys, values, **given)

        self._issuer.issue("fused_infer_attention_score", operands, graph.host.call, issue)
        return out.squeeze(1)

    def dense_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float, causal: bool
    ) -> torch.Tensor:
        operands = self._issuer.operands
        if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
            raise OperatorError.describe(
                "dense_attention",
                "takes [T, heads, head_dim], heads a multiple of k's",
                {"q": q, "k": k, "v": v},
            )
        q, k, v = (operands.dense("dense_attention", name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        out = torch.zeros_like(q)
        mask = self._triangle(q.device) if causal else None
        for begin, end in pairwise(int(s) for s in starts):
            if end <= begin:
                continue
            query, keys, values = (x[begin:end].unsqueeze(0) for x in (q, k, v))
            result, _ = self._issuer.issue(
                "fused_infer_attention_score",
                {"q": query, "k": keys, "v": values, "mask": mask},
                runtime.ops().npu_fused_infer_attention_score,
                query,
                keys,
                values,
                atten_mask=mask if end - begin > 1 else None,
                num_heads=q.shape[1],
                scale=scale,
                input_layout="BSND",
                num_key_value_heads=k.shape[1],
                sparse_mode=CAUSAL if causal and end - begin > 1 else ALL_KEYS,
            )
            out[begin:end].copy_(result[0])
        return out

    def _triangle(self, device: torch.device) -> torch.Tensor:
        """``[2048, 2048]`` bool, true above the diagonal, which is what is hidden; made on the host, once a device:
        torch_npu has tril and triu as operators of the older interface, compiled when they are first called."""
        found = self._triangles.get(device)
        if found is None:
            hidden = torch.ones((TRIANGLE, TRIANGLE), dtype=torch.bool, device="cpu").triu_(1)
            found = self._triangles[device] = hidden.to(device)
        return found
