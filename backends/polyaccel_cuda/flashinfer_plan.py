"""A step's attention as FlashInfer's wrappers want it planned: once, from host tensors, as the step begins.

A wrapper's plan is in pinned memory of its own until the device has copied it, and in device memory until its last call
has run. So a wrapper belongs to one step as long as that lives, and the event of its copy is waited for before it plans
again: wrappers come back in turn, so that it lies steps behind. In its first call a wrapper copies constants of its own
to the device: that call is made, into nothing, as the first step of an attention begins.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch

from polyaccel.backend import Device, Event, KVSpec, Launcher, Query, TokenClass
from polyaccel_cuda.flashinfer import FlashInfer
from polyaccel_cuda.kv_cache import BlockMajorKVCache
from polyaccel_cuda.step import CudaStep

Kind = Literal["decode", "prefill"]

MOST_VARIANTS = 16
"""That are planned for: the latest ones. A model has one or two."""
SMALLEST_WORKSPACE = 128 << 20
# What a plan reserves for parts of contexts: tiles of 128 rows of queries and heads, two a multiprocessor.
TILE, TILES = 128, 2


@dataclass(frozen=True, slots=True)
class Variant:
    """An attention that a model calls; ``window`` None for none."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None

    @classmethod
    def of(cls, spec: KVSpec, heads: int, scale: float, window: int | None) -> Variant:
        dtype = str(spec.dtype).removeprefix("torch.")
        return cls(dtype, heads, spec.kv_heads, spec.head_dim, float(scale), window)

    @classmethod
    def asked(cls, query: Query) -> Variant | None:
        """What a query asks for; None if it does not say."""
        static = query.static
        scale, window = static.get("scale"), static.get("window")
        if not isinstance(scale, float) or not (window is None or isinstance(window, int)):
            return None
        dtype, (heads, kv_heads, head_dim) = (
            str(static["dtype"]).removeprefix("torch."),
            (query.integer(name) for name in ("heads", "kv_heads", "head_dim")),
        )
        return cls(dtype, heads, kv_heads, head_dim, scale, window)

    def takes(self, spec: KVSpec, longest: int) -> bool:
        """Whether it reads such a cache, and sees all of a context."""
        own = Variant.of(spec, self.heads, self.scale, self.window)
        return own == self and (self.window is None or longest <= self.window)


@dataclass(frozen=True, slots=True)
class Call:
    """Query rows ``begin:end`` of a step, done by a planned wrapper."""

    kind: Kind
    begin: int
    end: int
    wrapper: Any


@dataclass(slots=True)
class _Slot:
    wrapper: Any
    workspace: torch.Tensor
    planned: Event | None = None


class _Pool:
    """Wrappers of one device, which share a workspace: their calls run one after the other."""

    def __init__(self, package: FlashInfer, device: Device) -> None:
        self._package, self._device = package, device
        self._free: dict[Kind, deque[_Slot]] = {"decode": deque(), "prefill": deque()}
        self._workspace: torch.Tensor | None = None
        self.called: set[tuple[Variant, Kind]] = set()

    def take(self, kind: Kind, variant: Variant) -> _Slot:
        """A wrapper that no living step has planned."""
        workspace, free = self._room(variant), self._free[kind]
        if free:
            slot = free.popleft()
            if slot.planned is not None:
                slot.planned.synchronize()
            return slot
        if kind == "decode":
            # On plain cores a query head reads the keys of its group anew.
            return _Slot(self._package.decode(workspace, "HND", use_tensor_cores=True, backend="fa2"), workspace)
        return _Slot(self._package.prefill(workspace, "HND", backend="fa2"), workspace)

    def give(self, kind: Kind, slot: _Slot) -> None:
        if slot.workspace is self._workspace:
            self._free[kind].append(slot)

    def _room(self, variant: Variant) -> torch.Tensor:
        device = self._device.torch_device
        cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        rows = variant.heads // variant.kv_heads * TILES * cores * TILE
        size = max(SMALLEST_WORKSPACE if device.type == "cuda" else 0, 4 * rows * (variant.head_dim + 1) + 256)
        if self._workspace is None or self._workspace.numel() < size:
            for free in self._free.values():
                free.clear()
            self._workspace = self._device.zeros((size,), torch.uint8)
        return self._workspace


class Planner:
    """Plans steps for the attentions that a model's plan has asked for."""

    def __init__(self, package: FlashInfer, launcher: Launcher) -> None:
        self._package, self._launcher = package, launcher
        self._variants: dict[Variant, None] = {}
        self._pools: dict[torch.device, _Pool] = {}
        self._calls: WeakKeyDictionary[CudaStep, dict[Variant, tuple[Call, ...]]] = WeakKeyDictionary()

    def announce(self, query: Query) -> None:
        """Steps that begin from now on are planned for what a query asks for."""
        variant = Variant.asked(query)
        if variant is None:
            return
        self._variants.pop(variant, None)
        self._variants[variant] = None
        while len(self._variants) > MOST_VARIANTS:
            del self._variants[next(iter(self._variants))]

    def begin(self, step: CudaStep, device: Device, *, captured: bool) -> None:
        """Hand the device what the step's calls need, as the step begins. ``captured``: decode steps are replayed."""
        kv, inputs = step.state.kv, step.input
        if (
            not isinstance(kv, BlockMajorKVCache)
            or (captured and inputs.token_class is TokenClass.DECODE)
            or not _plain(step)
        ):
            return
        longest = int(inputs.context_lengths.max())
        wanted = [variant for variant in self._variants if variant.takes(kv.spec, longest)]
        if not wanted:
            return
        pool = self._pools.get(device.torch_device)
        if pool is None:
            pool = self._pools[device.torch_device] = _Pool(self._package, device)
        with device.scope():
            planned = {variant: _plan(step, kv.spec, variant, pool, device) for variant in wanted}
        for variant, calls in planned.items():
            for call in calls:
                if (variant, call.kind) not in pool.called:
                    pool.called.add((variant, call.kind))
                    self._call(call, variant, kv, device)
        self._calls[step] = planned

    def calls(self, step: CudaStep, variant: Variant) -> tuple[Call, ...]:
        """The calls of a step; none where it is not planned for, or captured."""
        return () if step.captured else self._calls.get(step, {}).get(variant, ())

    def _call(self, call: Call, variant: Variant, kv: BlockMajorKVCache, device: Device) -> None:
        q = device.zeros((call.end - call.begin, variant.heads, variant.head_dim), kv.spec.dtype)
        out, stored = torch.empty_like(q), kv.layer(0)
        operands = {"q": q, "kv": stored[0]}
        self._launcher.launch("cuda.flashinfer_first_call", operands, call.wrapper.run, q, stored, out=out)


def _plain(step: CudaStep) -> bool:
    """Whether every sequence has queries, and a key for each."""
    inputs = step.input
    counts, contexts = np.diff(inputs.query_starts), inputs.context_lengths
    return len(counts) > 0 and len(counts) == len(contexts) and bool((counts > 0).all() and (contexts >= counts).all())


def _plan(step: CudaStep, spec: KVSpec, variant: Variant, pool: _Pool, device: Device) -> tuple[Call, ...]:
    inputs, size = step.input, spec.block_size
    contexts, rows = inputs.context_lengths.astype(np.int64), inputs.query_starts
    pages = -(-contexts // size)
    starts = np.concatenate(([0], np.cumsum(pages)))
    common: dict[str, Any] = {
        "num_qo_heads": variant.heads,
        "num_kv_heads": variant.kv_heads,
        "page_size": size,
        "sm_scale": variant.scale,
        "q_data_type": spec.dtype,
        "kv_data_type": spec.dtype,
    }
    calls: list[Call] = []
    decodes, sequences = step.decodes, len(contexts)
    parts: tuple[tuple[Kind, int, int], ...] = (("decode", 0, decodes), ("prefill", decodes, sequences))
    for kind, first, last in parts:
        if first == last:
            continue
        # Pinned memory of its own, for the copies are under way when this returns.
        pinned = device.torch_device.type == "cuda"
        host = torch.empty((3, last - first + 1), dtype=torch.int32, pin_memory=pinned)
        indptr, queries, filled = host[0], host[1], host[2, :-1]
        indptr.numpy()[:] = starts[first : last + 1] - starts[first]
        queries.numpy()[:] = rows[first : last + 1] - rows[first]
        filled.numpy()[:] = (contexts - (pages - 1) * size)[first:last]
        indices = step.tables[int(starts[first]) : int(starts[last])]
        slot = pool.take(kind, variant)
        if kind == "decode":
            slot.wrapper.plan(indptr=indptr, indices=indices, last_page_len=filled, head_dim=variant.head_dim, **common)
        else:
            slot.wrapper.plan(
                qo_indptr=queries,
                paged_kv_indptr=indptr,
                paged_kv_indices=indices,
                paged_kv_last_page_len=filled,
                head_dim_qk=variant.head_dim,
                causal=True,
                **common,
            )
        slot.planned = device.record()
        weakref.finalize(step, pool.give, kind, slot).atexit = False
        calls.append(Call(kind, int(rows[first]), int(rows[last]), slot.wrapper))
    return tuple(calls)
