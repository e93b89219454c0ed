"""The null backend: every operator answers with a shape, sampling with a scripted token, graphs replay in no time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from polyaccel.backend.adapter_store import AdapterStore
from polyaccel.backend.backend import Availability, Backend, Implementations, RankAddress
from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device
from polyaccel.backend.graph import Graph, GraphKey, StepFunction
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.null.communicator import NullCommunicator
from polyaccel.backend.null.device import NullDevice
from polyaccel.backend.null.storage import NullAdapterStore, NullKVCache, NullSamplingState, NullWeight
from polyaccel.backend.sampling import SampleOutput, SamplingSpec, SamplingState
from polyaccel.backend.step import AdapterRows, DeviceState, RowSet, Step, StepInput, plan_key
from polyaccel.backend.support import Reason
from polyaccel.backend.weight import Weight, WeightSpec

Script = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(seeds uint64 [R], positions int64 [R] of the tokens being sampled, vocabulary) -> ids int64 [R]."""


def default_script(seeds: np.ndarray, positions: np.ndarray, vocabulary: int) -> np.ndarray:
    """A fixed hash of seed and position."""
    with np.errstate(over="ignore"):
        mixed = (seeds + np.uint64(0x9E3779B97F4A7C15)) * (positions.astype(np.uint64) + np.uint64(0xBF58476D1CE4E5B9))
        mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(vocabulary)).astype(np.int64)


class NullStep(Step):
    """Metadata stays on the host."""

    torch_device = torch.device("meta")

    def __init__(self, inputs: StepInput, state: DeviceState) -> None:
        self.input, self.state = inputs, state
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)

    def tensor(self, name: str) -> torch.Tensor:
        array: np.ndarray = getattr(self.input, name)
        return torch.empty(array.shape, dtype=torch.int64, device="meta")

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows: AdapterRows = self.input.rows(row_set)
        empty = torch.empty(len(rows), dtype=torch.int64, device="meta")
        return empty, empty, empty.float()


class NullGraph(Graph):
    """Replays the launches of its capture into the ledger and the script into the result."""

    def __init__(self, key: GraphKey, backend: NullBackend, delta: Mapping[str, int]) -> None:
        self.key = key
        self._backend, self._delta = backend, dict(delta)

    def replay(self, step: Step) -> SampleOutput:
        self._backend.ledger.add(self._delta)
        return self._backend.scripted(step)

    def close(self) -> None:
        return None


class NullBackend(Backend):
    """``latency``: seconds that every step takes on the fake device. ``script``: the token of a (seed, position)."""

    name = "null"
    isolate = False
    fork_safe = True
    priority = None

    def __init__(self, *, latency: float = 0.0, script: Script = default_script, graphs: bool = True) -> None:
        super().__init__()
        self._latency, self._script, self._graphs = latency, script, graphs
        self._device = NullDevice()

    def probe(self) -> Availability:
        return Availability(usable=True, reason="computes nothing: scripted tokens", devices=("null",))

    def devices(self) -> Sequence[Device]:
        return (self._device,)

    def operators(self) -> Mapping[str, Implementations]:
        shapes: dict[str, Callable[..., object]] = {
            "embedding": lambda weight, step, vocabulary_start: _empty(
                weight.spec.dtype, step.input.tokens, weight.spec.k
            ),
            "linear": lambda x, weight: _empty(x.dtype, x.shape[0], weight.spec.n),
            "rms_norm": lambda x, weight, eps, residual=None: x if residual is None else (x, residual),
            "layer_norm": lambda x, weight, bias, eps: x,
            "rotary_embedding": lambda q, k, rope, step: (q, k),
            "silu_and_mul": lambda x: x[:, : x.shape[1] // 2],
            "gelu": lambda x, approximate: x,
            "select_rows": lambda x, step: _empty(x.dtype, len(step.input.logits_rows), x.shape[1]),
            "write_kv_cache": lambda k, v, kv, layer, step: None,
            "paged_attention": lambda q, kv, layer, step, scale, window: q,
            "dense_attention": lambda q, k, v, starts, scale, causal: q,
            "sgmv": lambda y, x, weight, step, row_set: y,
            "sgmv_shrink": _shrink,
            "sgmv_expand": lambda y, h, weight, step, row_set: y,
            "moe_route": _route,
            "moe_experts": lambda x, gate_up, down, ids, weights, step, act, expert_map=None: x,
            "dequantize": _dequantize,
            "sample": lambda logits, state, step: self.scripted(step),
            "all_reduce": lambda x, comm: comm.all_reduce(x),
            "all_gather": lambda x, comm, dim: comm.all_gather(x, dim),
            "reduce_scatter": lambda x, comm: comm.reduce_scatter(x),
            "all_to_all": lambda x, comm, send_rows, receive_rows: comm.all_to_all(x, send_rows, receive_rows),
            "broadcast": lambda x, comm, source: comm.broadcast(x, source),
            "barrier": lambda comm: comm.barrier(),
        }
        return {name: self._recorded(name, fn) for name, fn in shapes.items()}

    def _recorded(self, name: str, fn: Callable[..., object]) -> Callable[..., object]:
        kernel = f"null.{name}"

        @functools.wraps(fn)
        def run(*args: object, **kwargs: object) -> object:
            self.ledger.record(kernel)
            return fn(*args, **kwargs)

        return run

    def scripted(self, step: Step) -> SampleOutput:
        """The script's tokens for a step's rows, available after the fake latency."""
        state = step.state.sampling
        assert isinstance(state, NullSamplingState)
        inputs = step.input
        seeds = state.seeds[inputs.sample_slots]
        positions = inputs.positions[inputs.logits_rows] + 1
        self._device.busy(self._latency)
        return SampleOutput(ids=torch.from_numpy(self._script(seeds, positions, state.spec.vocabulary)))

    def connect(self, address: RankAddress) -> Communicator:
        communicator = super().connect(address)
        return communicator if address.world_size == 1 else NullCommunicator(communicator)

    # -- storage and stepping ------------------------------------------------------------------------------------------

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return NullWeight(spec)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        return NullAdapterStore(weights, rank_rows=rank_rows, slots=slots)

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        return NullKVCache(spec)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        return NullSamplingState(spec)

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        return NullStep(inputs, state)

    def graph_refusals(self) -> list[Reason]:
        return [] if self._graphs else ["switched off"]

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        with self.ledger.capture() as delta:
            fn(step)
        return NullGraph(key, self, delta)


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dequantize(weight: Weight) -> torch.Tensor:
    spec = weight.spec
    return _empty(spec.dtype, *(() if spec.experts is None else (spec.experts,)), spec.n, spec.k)


def _shrink(x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
    return _empty(x.dtype, len(step.input.rows(row_set)), len(weight.spec.slices), 0)


def _route(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalise: bool,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[0]
    return _empty(torch.float32, rows, top_k), _empty(torch.int32, rows, top_k)
