"""The CPU backend's operators with the contract's signatures.

Operands are checked and brought into layout here, and every kernel is launched through the guard under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from polyaccel.backend.composite.attention import dense_attention as composite_dense
from polyaccel.backend.composite.attention import write_kv_cache as composite_write
from polyaccel.backend.composite.dense import select_rows
from polyaccel.backend.composite.lora import sgmv as composite_sgmv
from polyaccel.backend.cpu import dense, lora
from polyaccel.backend.cpu.attention import paged_attention
from polyaccel.backend.cpu.linear import check_rows, multiply
from polyaccel.backend.cpu.sampling import sample
from polyaccel.backend.cpu.step import CpuStep, own_cache
from polyaccel.backend.cpu.weight import PackedWeight
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.guard import Launcher
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.ledger import COPY_PREFIX
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.sampling import SampleOutput, SamplingState
from polyaccel.backend.step import RowSet, Step
from polyaccel.backend.weight import Weight

Function = Callable[..., object]


class CpuOperators:
    """Operators of one backend instance."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._launch = launcher.launch
        self._scalars: dict[float, torch.Tensor] = {}

    def table(self) -> Mapping[str, Function]:
        """Operators that have a form of their own."""
        return {
            "linear": self.linear,
            "embedding": self.embedding,
            "rms_norm": self.rms_norm,
            "rotary_embedding": self.rotary_embedding,
            "silu_and_mul": self.silu_and_mul,
            "select_rows": self.select_rows,
            "write_kv_cache": self.write_kv_cache,
            "paged_attention": self.paged_attention,
            "dense_attention": self.dense_attention,
            "sgmv": self.sgmv,
            "sample": self.sample,
        }

    # -- layout ------------------------------------------------------------------------------------------------------

    def contiguous(self, operator: str, argument: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself or a copy, which the ledger counts."""
        if x.is_contiguous():
            return x
        self._launcher.ledger.record(f"{COPY_PREFIX}{operator}.{argument}")
        return x.contiguous()

    def dense_rows(self, operator: str, argument: str, x: torch.Tensor) -> torch.Tensor:
        """The same for kernels that take any row stride."""
        return x if x.stride(-1) == 1 else self.contiguous(operator, argument, x)

    def scalar(self, value: float) -> torch.Tensor:
        """``value`` as a float32 tensor without dimensions, the same one every time."""
        found = self._scalars.get(value)
        if found is None:
            found = self._scalars[value] = torch.tensor(value, dtype=torch.float32)
        return found

    # -- dense -------------------------------------------------------------------------------------------------------

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        own = check_rows("linear", x, weight)
        return self.project(self.contiguous("linear", "x", x), own)

    def project(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """``x @ W.T + bias`` for checked, contiguous x."""
        return self._launch("cpu.linear", (x,), multiply, x, weight)

    def embedding(self, weight: Weight, step: Step, vocabulary_start: int) -> torch.Tensor:
        if not isinstance(weight, PackedWeight):
            raise OperatorError("embedding", f"takes weights of the cpu backend, not {type(weight).__name__}")
        table = weight.tensor
        return self._launch("cpu.embedding", (table,), dense.embedding, table, weight.spec, step, vocabulary_start)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return self._launch("cpu.rms_norm", (x, weight), dense.rms_norm, x, weight, self.scalar(eps))
        return self._launch(
            "cpu.add_rms_norm", (x, residual, weight), dense.add_rms_norm, x, residual, weight, self.scalar(eps)
        )

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = CpuStep.of("rotary_embedding", step).rope_rows(rope)
        return self._turned(q, cos, sin, rope.style), self._turned(k, cos, sin, rope.style)

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
        turned = x.clone(memory_format=torch.contiguous_format)
        self._launch("cpu.rotary_embedding", (turned, cos, sin), dense.rotate_, turned, cos, sin, style)
        return turned

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return self._launch("cpu.silu_and_mul", (x,), dense.silu_and_mul, x)

    def select_rows(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        return self._launch("cpu.select_rows", (x,), select_rows, x, step)

    # -- attention ---------------------------------------------------------------------------------------------------

    def write_kv_cache(self, k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Step) -> None:
        own_cache("write_kv_cache", kv)
        self._launch("cpu.write_kv_cache", (k, v), composite_write, k, v, kv, layer, step)

    def paged_attention(
        self, q: torch.Tensor, kv: KVCache, layer: int, step: Step, scale: float, window: int | None = None
    ) -> torch.Tensor:
        cache = own_cache("paged_attention", kv)
        heads, head_dim = q.shape[1:]
        if head_dim != cache.spec.head_dim or heads % cache.spec.kv_heads or q.dtype != cache.spec.dtype:
            raise OperatorError.describe("paged_attention", f"the cache is {cache.spec}", {"q": q})
        q = self.dense_rows("paged_attention", "q", q)
        plan = CpuStep.of("paged_attention", step).attention(cache.spec, heads, window)
        return self._launch("cpu.paged_attention", (q,), paged_attention, q, cache, layer, plan, scale)

    def dense_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts: Sequence[int],
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        # The products copy operands of other strides, every segment again.
        q, k, v = (self.contiguous("dense_attention", name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        return self._launch("cpu.dense_attention", (q, k, v), composite_dense, q, k, v, starts, scale, causal)

    # -- adapters ----------------------------------------------------------------------------------------------------

    def sgmv(
        self, y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        own = check_rows("sgmv", x, weight)
        if y.dtype != x.dtype or y.shape[-1] != own.spec.n:
            reason = f"weight {own.spec.site!r} gives rows of {own.spec.n} in x's dtype"
            raise OperatorError.describe("sgmv", reason, {"y": y, "x": x})
        return self.adapt(y, self.contiguous("sgmv", "x", x), own, CpuStep.of("sgmv", step), row_set)

    def adapt(
        self, y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, step: CpuStep, row_set: RowSet
    ) -> torch.Tensor:
        """Add the step's adapters at this weight to ``y``, in place, for checked, contiguous x."""
        plan = step.adapter_plan(row_set)
        batches = plan.batches(weight.spec.site) if plan is not None else ()
        if plan is None or not batches:
            return y
        if plan.single or y.dtype == torch.float32:
            return self._launch("cpu.sgmv", (y, x), lora.add_adapters, y, x, batches)
        return self._launch("cpu.sgmv_wide", (y, x), composite_sgmv, y, x, weight, step, row_set)

    def delta(self, x: torch.Tensor, weight: PackedWeight, step: CpuStep, row_set: RowSet) -> torch.Tensor | None:
        """What the step's adapters add at this weight, to be added by the product itself; None where they add nothing.

        Only where :meth:`adds_by_product` says so.
        """
        plan = step.adapter_plan(row_set)
        batches = plan.batches(weight.spec.site) if plan is not None else ()
        return self._launch("cpu.sgmv", (x,), lora.delta, x, batches) if batches else None

    def adds_by_product(self, x: torch.Tensor, step: CpuStep, row_set: RowSet) -> bool:
        """Whether adapters are best added by the base product: few rows, whose deltas are one batched product."""
        plan = step.adapter_plan(row_set)
        return plan is None or (plan.decode and x.dtype == torch.float32)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, state: SamplingState, step: Step) -> SampleOutput:
        return self._launch("cpu.sample", (logits,), sample, logits, state, step)
