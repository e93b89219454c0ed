"""Every operator of the contract as one kernel, whose arithmetic is that of the plain-torch forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch

from polyaccel.backend import (
    Communicator,
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
from polyaccel.backend.composite import attention, dense, lora, moe, sampling
from polyaccel.backend.composite import linear as linears
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel_conformance.simulated.launch import Shape, launch
from polyaccel_conformance.simulated.operands import check_operands
from polyaccel_conformance.simulated.step import SimulatedStep
from polyaccel_conformance.simulated.storage import SimulatedKVCache, SimulatedSamplingState, weight_tensors

Operands = Mapping[str, torch.Tensor | None]

_NO_SIZES: Mapping[str, int] = MappingProxyType({})


class SimulatedOperators:
    """Issues kernels. Methods have the arguments of the specification."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def table(self) -> dict[str, Callable[..., object]]:
        """By operator name."""
        return {
            name: fn for name, fn in inspect.getmembers(self, inspect.ismethod) if name[0] != "_" and name != "table"
        }

    def _run(
        self,
        kernel: str,
        operands: Operands,
        effect: Callable[[], object],
        outputs: Sequence[Shape] = (),
        sizes: Mapping[str, int] = _NO_SIZES,
    ) -> list[torch.Tensor]:
        """``sizes``: dimensions of the specification that are known from elsewhere than the operands."""
        check_operands(kernel, operands, sizes, self._launcher.rank)
        return launch(self._launcher, f"simulated.{kernel}", operands, effect, outputs)

    # -- dense -------------------------------------------------------------------------------------------------------

    def embedding(self, weight: Weight, step: Step, vocabulary_start: int) -> torch.Tensor:
        issued, spec = _issued("embedding", step), weight.spec

        def effect() -> torch.Tensor:
            table = linears.dequantize(weight)
            return dense.embedding(table, spec, issued.running(), vocabulary_start)

        operands = {**weight_tensors(weight), **_step_operand(issued)}
        return self._run("embedding", operands, effect, [((issued.extent.tokens, spec.k), spec.dtype)])[0]

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        spec = weight.spec
        if x.dtype != spec.dtype or x.shape[-1] != spec.k or spec.experts is not None:
            raise OperatorError.describe("linear", f"{spec.site!r} takes {spec.dtype} rows of {spec.k}", {"x": x})
        operands = {"x": x, **weight_tensors(weight)}
        shape = ((*x.shape[:-1], spec.n), x.dtype)
        return self._run("linear", operands, lambda: linears.linear(x, weight), [shape], _sizes(weight))[0]

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        outputs = [(x.shape, x.dtype)] * (1 if residual is None else 2)
        made = self._run(
            "rms_norm",
            {"x": x, "weight": weight, "residual": residual},
            lambda: dense.rms_norm(x, weight, eps, residual),
            outputs,
        )
        return made[0] if residual is None else (made[0], made[1])

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        operands = {"x": x, "weight": weight, "bias": bias}
        return self._run("layer_norm", operands, lambda: dense.layer_norm(x, weight, bias, eps), [(x.shape, x.dtype)])[
            0
        ]

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        issued = _issued("rotary_embedding", step)
        operands = {"q": q, "k": k, "rope.cos": rope.cos, "rope.sin": rope.sin, **_step_operand(issued)}
        made = self._run(
            "rotary_embedding",
            operands,
            lambda: dense.rotary_embedding(q, k, rope, issued.running()),
            [(q.shape, q.dtype), (k.shape, k.dtype)],
            sizes={"T": issued.extent.tokens},
        )
        return made[0], made[1]

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        shape = ((*x.shape[:-1], x.shape[-1] // 2), x.dtype)
        return self._run("silu_and_mul", {"x": x}, lambda: dense.silu_and_mul(x), [shape])[0]

    def gelu(self, x: torch.Tensor, approximate: Literal["none", "tanh"] = "none") -> torch.Tensor:
        return self._run("gelu", {"x": x}, lambda: dense.gelu(x, approximate), [(x.shape, x.dtype)])[0]

    def select_rows(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        issued = _issued("select_rows", step)
        if issued.extent.rows == x.shape[0]:
            return x
        operands = {"x": x, **_step_operand(issued)}
        shape = ((issued.extent.rows, *x.shape[1:]), x.dtype)
        tokens = {"T": issued.extent.tokens}
        return self._run("select_rows", operands, lambda: dense.select_rows(x, issued.running()), [shape], tokens)[0]

    # -- attention ---------------------------------------------------------------------------------------------------

    def write_kv_cache(self, k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Step) -> None:
        issued, cache = _issued("write_kv_cache", step), _cache("write_kv_cache", kv)
        operands = {"k": k, "v": v, "kv": cache.buffer, **_step_operand(issued)}
        self._run(
            "write_kv_cache",
            operands,
            lambda: attention.write_kv_cache(k, v, cache, layer, issued.running()),
            sizes=_heads(issued, cache),
        )

    def paged_attention(
        self, q: torch.Tensor, kv: KVCache, layer: int, step: Step, scale: float, window: int | None = None
    ) -> torch.Tensor:
        issued, cache = _issued("paged_attention", step), _cache("paged_attention", kv)
        operands = {"q": q, "kv": cache.buffer, **_step_operand(issued)}
        return self._run(
            "paged_attention",
            operands,
            lambda: attention.paged_attention(q, cache, layer, issued.running(), scale, window),
            [(q.shape, q.dtype)],
            sizes={"T": issued.extent.tokens, "head_dim": cache.spec.head_dim},
        )[0]

    def dense_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float, causal: bool
    ) -> torch.Tensor:
        return self._run(
            "dense_attention",
            {"q": q, "k": k, "v": v},
            lambda: attention.dense_attention(q, k, v, starts, scale, causal),
            [((*q.shape[:-1], v.shape[-1]), q.dtype)],
        )[0]

    # -- adapters ----------------------------------------------------------------------------------------------------

    def sgmv(
        self, y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        issued = _issued("sgmv", step)
        operands = {"y": y, "x": x, **weight_tensors(weight), **_step_operand(issued)}
        self._run(
            "sgmv",
            operands,
            lambda: _in_place(lora.sgmv(y, x, weight, issued.running(), row_set)),
            sizes=_sizes(weight),
        )
        return y

    def sgmv_shrink(self, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
        issued, slices = _issued("sgmv_shrink", step), len(weight.spec.slices)
        store, triples, largest = issued.state.adapters, len(issued.input.rows(row_set)), 0
        if store is not None and triples:
            filled = [slot for slot, where in enumerate(store.ranges()) if where is not None]
            ranks = [store.true_rank(weight.spec.site, i, slot) for slot in filled for i in range(slices)]
            largest = max(ranks, default=0)
        operands = {"x": x, **weight_tensors(weight), **_step_operand(issued)}
        return self._run(
            "sgmv_shrink",
            operands,
            lambda: lora.sgmv_shrink(x, weight, issued.running(), row_set),
            [((triples, slices, largest), torch.float32)],
            sizes=_sizes(weight),
        )[0]

    def sgmv_expand(
        self, y: torch.Tensor, h: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        issued = _issued("sgmv_expand", step)
        operands = {"y": y, "h": h, **weight_tensors(weight), **_step_operand(issued)}
        self._run(
            "sgmv_expand",
            operands,
            lambda: _in_place(lora.sgmv_expand(y, h, weight, issued.running(), row_set)),
            sizes={"n": weight.spec.n, "slices": len(weight.spec.slices)},
        )
        return y

    # -- experts -----------------------------------------------------------------------------------------------------

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
        if not 1 <= top_k <= logits.shape[-1]:
            raise OperatorError.describe("moe_route", f"top_k {top_k}", {"logits": logits})
        shape = (logits.shape[0], top_k)
        made = self._run(
            "moe_route",
            {"logits": logits, "bias": bias},
            lambda: moe.moe_route(logits, top_k, scoring, renormalise, bias, groups, topk_groups, scale),
            [(shape, torch.float32), (shape, torch.int32)],
        )
        return made[0], made[1]

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
        if act != "silu":
            raise OperatorError("moe_experts", f"activation {act!r}, expected 'silu'")
        issued = _issued("moe_experts", step)
        operands = {
            "x": x,
            **weight_tensors(gate_up, "gate_up"),
            **weight_tensors(down, "down"),
            "ids": ids,
            "weights": weights,
            "expert_map": expert_map,
            **_step_operand(issued),
        }

        def effect() -> torch.Tensor:
            return moe.moe_experts(
                x, gate_up, down, ids, weights, issued.running(), act, expert_map, dequantize=linears.dequantize
            )

        shape = ((x.shape[0], down.spec.n), x.dtype)
        return self._run("moe_experts", operands, effect, [shape], {"hidden": gate_up.spec.k})[0]

    # -- others ------------------------------------------------------------------------------------------------------

    def dequantize(self, weight: Weight) -> torch.Tensor:
        operands, spec = weight_tensors(weight), weight.spec
        if isinstance(weight, TensorWeight) and weight.quantised is None:
            return weight.tensor
        lead = () if spec.experts is None else (spec.experts,)
        shape = ((*lead, spec.n, spec.k), spec.dtype)
        return self._run("dequantize", operands, lambda: linears.dequantize(weight), [shape])[0]

    def sample(self, logits: torch.Tensor, state: SamplingState, step: Step) -> SampleOutput:
        """A captured sample computes log-probabilities whenever a replayed row asks for them."""
        issued = _issued("sample", step)
        if not isinstance(state, SimulatedSamplingState):
            raise OperatorError("sample", f"takes a SimulatedSamplingState, not {type(state).__name__}")
        rows, top = logits.shape[0], state.spec.max_top_logprobs
        outputs: list[Shape] = [((rows,), torch.int64)]
        full = state.runtime.capturing or state.wants_logprobs(issued.input.sample_slots.tolist())
        if full:
            outputs += [((rows,), torch.float32), ((rows, top), torch.int64), ((rows, top), torch.float32)]

        def effect() -> tuple[torch.Tensor | None, ...]:
            found = sampling.sample(logits, state, issued.running())
            return found.ids, found.logprobs, found.top_ids, found.top_logprobs

        operands = {"logits": logits, "state": state.parameters, **_step_operand(issued)}
        made = self._run(
            "sample", operands, effect, outputs, {"R": issued.extent.rows, "vocabulary": state.spec.vocabulary}
        )
        if not full:
            return SampleOutput(ids=made[0])
        return SampleOutput(ids=made[0], logprobs=made[1], top_ids=made[2], top_logprobs=made[3])

    # -- ranks -------------------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        return comm.all_reduce(x)

    def all_gather(self, x: torch.Tensor, comm: Communicator, dim: int = -1) -> torch.Tensor:
        return comm.all_gather(x, dim)

    def reduce_scatter(self, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        return comm.reduce_scatter(x)

    def all_to_all(
        self, x: torch.Tensor, comm: Communicator, send_rows: list[int], receive_rows: list[int]
    ) -> torch.Tensor:
        return comm.all_to_all(x, send_rows, receive_rows)

    def broadcast(self, x: torch.Tensor, comm: Communicator, source: int = 0) -> torch.Tensor:
        return comm.broadcast(x, source)

    def barrier(self, comm: Communicator) -> None:
        comm.barrier()


def _issued(operator: str, step: Step) -> SimulatedStep:
    if isinstance(step, SimulatedStep):
        if step.input.has_adapters and step.state.adapters is None:
            raise OperatorError(operator, "the step names adapters but its state has no adapter store")
        return step
    raise OperatorError(operator, f"takes a SimulatedStep, not {type(step).__name__}")


def _step_operand(step: SimulatedStep) -> dict[str, torch.Tensor | None]:
    return {"step": step.buffers.anchor}


def _cache(operator: str, kv: KVCache) -> SimulatedKVCache:
    if not isinstance(kv, SimulatedKVCache):
        raise OperatorError(operator, f"takes a SimulatedKVCache, not {type(kv).__name__}")
    return kv


def _sizes(weight: Weight) -> dict[str, int]:
    return {"k": weight.spec.k, "n": weight.spec.n}


def _heads(step: SimulatedStep, kv: KVCache) -> dict[str, int]:
    return {"T": step.extent.tokens, "kv_heads": kv.spec.kv_heads, "head_dim": kv.spec.head_dim}


def _in_place(result: torch.Tensor) -> None:
    """The operator has written to its argument; there is nothing to copy."""
