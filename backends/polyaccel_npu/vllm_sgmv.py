"""Adapters by vllm-ascend's own kernels, ``torch.ops._C_ascend.sgmv_shrink`` and ``sgmv_expand``, for those who have
built them and ask for them.

They take raw addresses, check no layout, and move whole blocks of 32 bytes (csrc/torch_binding.cpp and csrc/kernels of
vllm-ascend). What they do not take is a reason in the plan where it is known at load; where it depends on the step or
on its adapters, grouped matmul does the call, and the ledger says so. h is float32, y is rounded once.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch

from polyaccel.backend import (
    AdapterRows,
    BackendUnavailable,
    Device,
    Entry,
    PackedAdapter,
    PackedEntry,
    Query,
    Reason,
    RowSet,
    SlotRange,
    Step,
    Weight,
    WeightSpec,
)
from polyaccel.backend.composite.adapter_store import Module, SiteBuffers
from polyaccel_npu import check
from polyaccel_npu.adapter_store import NpuAdapterStore, wide_b
from polyaccel_npu.chip import Chip
from polyaccel_npu.lora import Lora
from polyaccel_npu.step import NpuStep

NAME = "vllm-ascend"
EXTENSION = "vllm_ascend.vllm_ascend_C"
NEEDED = ("sgmv_shrink", "sgmv_expand")
EVIDENCE = tuple(f"_C_ascend::{name}" for name in NEEDED)
RANKS = (8, 16, 32, 64)
"""SUPPORTED_RANKS of sgmv_expand.cpp; every other rank gives sums of nothing in particular, without an error."""
BLOCK = 16
"""16-bit values in the 32 bytes that DataCopy moves at least, and that rows have to begin at."""
DTYPES = ("float16", "bfloat16")
FAMILIES = ("A2", "A3")
"""Chips that vllm-ascend builds them for; on 310P it runs adapters as plain torch."""


def require() -> None:
    """Load the kernels.

    Raises:
        BackendUnavailable: they are not there; says what to install.
    """
    cause: Exception | None = None
    if not _registered() and importlib.util.find_spec(EXTENSION.partition(".")[0]) is not None:
        try:
            importlib.import_module(EXTENSION)
        except (ImportError, OSError, RuntimeError) as error:
            cause = error
    if not _registered():
        because = f": {type(cause).__name__}: {cause}" if cause else " (vllm-ascend is not installed)"
        raise BackendUnavailable(
            f"sgmv={NAME!r} was asked for, and torch.ops._C_ascend has no {' and '.join(NEEDED)}{because}; install "
            "vllm-ascend with its kernels, or leave sgmv at 'grouped'"
        ) from cause


def _registered() -> bool:
    return all(hasattr(torch.ops._C_ascend, name) for name in NEEDED)


def refusals(query: Query, chip: Chip) -> list[Reason]:
    """Why the kernels do not do a site's adapters; empty without adapters."""
    if not query.adapters and query.operator != "sgmv":
        return []
    reasons, dtype = [], str(query.static.get("dtype", "")).removeprefix("torch.")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype or 'unknown'}; vllm-ascend's sgmv takes {' and '.join(DTYPES)}")
    if chip.family not in FAMILIES:
        reasons.append(f"chip {chip.family}; vllm-ascend builds sgmv for {' and '.join(FAMILIES)}")
    rank, slices = query.integer("largest_rank"), query.static.get("slices", ())
    if rank not in RANKS:
        reasons.append(f"rank {rank}; vllm-ascend's sgmv takes {', '.join(map(str, RANKS))}")
    return [*reasons, *_widths(query.integer("k"), slices if isinstance(slices, tuple) else (), rank)]


def before(entry: Entry, fn: Callable[..., object], chip: Chip) -> Entry:
    """The entry with adapters by the kernels, ``fn``, and with what those refuse beside its own reasons."""

    def supports(query: Query) -> list[Reason]:
        return [*entry.supports(query), *refusals(query, chip)]

    detail = ", ".join(part for part in ("adapters by vllm-ascend's sgmv", entry.detail) if part)
    return replace(entry, fn=fn, supports=supports, evidence=(*entry.evidence, *EVIDENCE), detail=detail)


def _widths(k: int, slices: tuple[int, ...], rank: int) -> list[Reason]:
    reasons = []
    if k % BLOCK or k <= rank:
        reasons.append(f"k {k}; vllm-ascend's sgmv takes multiples of {BLOCK} above the rank, {rank}")
    for n in dict.fromkeys(slices):
        if n % BLOCK or n < rank:
            reasons.append(f"a slice of {n}; vllm-ascend's sgmv takes multiples of {BLOCK} from the rank, {rank}, on")
    return reasons


class VllmAdapterStore(NpuAdapterStore):
    """With each B once more as the kernels read it: ``[n, rank]`` of the weight's dtype, a slot's at ``n`` times its
    first rank row. So slots whose first rows are a multiple of their rank apart are one buffer ``[.., n, rank]``.

    Attributes:
        expand: by site, a flat buffer of each slice.
    """

    def __init__(self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device) -> None:
        self.expand: dict[str, tuple[torch.Tensor, ...]] = {}
        self._batches: WeakKeyDictionary[NpuStep, dict[RowSet, tuple[Batch, ...]]] = WeakKeyDictionary()
        super().__init__(weights, rank_rows=rank_rows, slots=slots, device=device)

    def _allocate(self, spec: WeightSpec) -> SiteBuffers:
        if takes(spec):
            flat = (self._device.zeros((self.rank_rows * part.n,), spec.dtype) for part in spec.slices)
            self.expand[spec.site] = tuple(flat)
        return super()._allocate(spec)

    def _scatter(self, where: SlotRange, packed: PackedAdapter, modules: Mapping[Module, PackedEntry]) -> None:
        super()._scatter(where, packed, modules)
        first, end = where.first_rank_row, where.first_rank_row + where.rank_rows
        for site, buffers in self.expand.items():
            for index, flat in enumerate(buffers):
                _, b = self.sites[site].rows(index, None, first, where.rank_rows)
                n = b.shape[1]
                flat[first * n : end * n].view(n, where.rank_rows).copy_(b.t())

    def prepare(self, step: NpuStep) -> None:
        """Hand the device what the step's calls need, as the step begins. ``step`` names this store."""
        inputs = step.input
        rows: dict[RowSet, int] = {"tokens": inputs.tokens, "logits": len(inputs.logits_rows)}
        self._batches[step] = {
            row_set: _batches(step, count, inputs.rows(row_set), self)
            for row_set, count in rows.items()
            if len(inputs.rows(row_set))
        }

    def batches(self, step: NpuStep, row_set: RowSet) -> tuple[Batch, ...]:
        """The calls of a step's row set; none where the kernels do not take it."""
        return self._batches.get(step, {}).get(row_set, ())

    @property
    def nbytes(self) -> int:
        own = sum(flat.numel() * flat.element_size() for buffers in self.expand.values() for flat in buffers)
        return super().nbytes + own


def takes(spec: WeightSpec) -> bool:
    """Whether the kernels can do adapters of this weight at all, whatever the rank."""
    return wide_b(spec) and not spec.lookup and not _widths(spec.k, tuple(p.n for p in spec.slices), RANKS[0])


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's segments of one rank whose slots are multiples of it apart: one call.

    ``rows``: of the step. ``offset``: rank rows before the first that counts. ``indices``, ``lengths``: int64, the
    adapter of each run of rows, -1 for none of this batch, and how many rows it is. ``slots``: those of the batch.
    """

    rows: int
    rank: int
    offset: int
    slots: tuple[int, ...]
    indices: torch.Tensor
    lengths: torch.Tensor


class VllmLora(Lora):
    """Grouped matmul with the kernels in its place where they take a call."""

    def sgmv(
        self, y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens"
    ) -> torch.Tensor:
        check.rows("sgmv", "x", x, weight, weight.spec.k)
        check.rows("sgmv", "y", y, weight, weight.spec.n)
        own = NpuStep.of("sgmv", step)
        batches = self._taken(x, weight, own, row_set) if len(y) == len(x) and _addressable(y) else ()
        if not batches:
            return super().sgmv(y, x, weight, step, row_set)
        self._issuer.launcher.common_device("npu.sgmv", {"y": y, "x": x})
        return self._add(y, x, weight, own, batches)

    def partial(self, x: torch.Tensor, weight: Weight, step: NpuStep, row_set: RowSet) -> torch.Tensor | None:
        batches = self._taken(x, weight, step, row_set)
        if not batches:
            return super().partial(x, weight, step, row_set)
        return self._add(x.new_zeros((x.shape[0], weight.spec.n)), x, weight, step, batches)

    def _add(
        self, y: torch.Tensor, x: torch.Tensor, weight: Weight, step: NpuStep, batches: tuple[Batch, ...]
    ) -> torch.Tensor:
        store, spec, kernels = step.state.adapters, weight.spec, torch.ops._C_ascend
        assert isinstance(store, VllmAdapterStore)
        x = self._issuer.operands.dense("sgmv", "x", x)
        buffers = store.sites[spec.site]
        for batch in batches:
            rank, offset = batch.rank, batch.offset
            count = (store.rank_rows - offset) // rank
            runs = batch.indices, batch.lengths
            h = torch.empty((x.shape[0], rank), dtype=torch.float32, device=x.device)
            for index, (begin, end) in enumerate(pairwise(spec.starts)):
                if not store.true_rank(spec.site, index, batch.slots[0]):
                    continue
                a = buffers.a[index, offset : offset + count * rank].view(count, rank, spec.k)
                b = store.expand[spec.site][index].narrow(0, offset * (end - begin), count * rank * (end - begin))
                b = b.view(count, end - begin, rank)
                shrink: dict[str, torch.Tensor | None] = {"x": x, "a": a, "h": h}
                self._issuer.issue("vllm_sgmv_shrink", shrink, kernels.sgmv_shrink, x, a, *runs, h, 1.0)
                expand: dict[str, torch.Tensor | None] = {"h": h, "b": b, "y": y}
                self._issuer.issue("vllm_sgmv_expand", expand, kernels.sgmv_expand, h, b, *runs, y, begin, end - begin)
        return y

    def _taken(self, x: torch.Tensor, weight: Weight, step: NpuStep, row_set: RowSet) -> tuple[Batch, ...]:
        """The calls that do this site's adapters; none where the kernels do not take all of them."""
        found, spec = step.adapters(row_set), weight.spec
        if step.graph is not None or found is None or not x.shape[0]:
            return ()
        store = found[1]
        if not isinstance(store, VllmAdapterStore) or spec.site not in store.expand or x.dtype not in _HALVES:
            return ()
        if x.is_contiguous() and not _addressable(x):  # any other is copied, to where a row may begin
            return ()
        batches = store.batches(step, row_set)
        widths = tuple(part.n for part in spec.slices)
        for batch in batches:
            # Rows of zeros below the true rank are no way out: they make NaN of an infinity in x.
            for index in range(len(widths)):
                if {store.true_rank(spec.site, index, slot) for slot in batch.slots} not in ({batch.rank}, {0}):
                    return ()
            if batch.rows != x.shape[0] or _widths(spec.k, widths, batch.rank):
                return ()
        return batches


_HALVES = (torch.float16, torch.bfloat16)


def prepare(step: NpuStep) -> None:
    """What a step needs that begins, where it has adapters in a store for the kernels."""
    store = step.state.adapters
    if isinstance(store, VllmAdapterStore) and step.input.has_adapters:
        with step.device.scope():
            store.prepare(step)


def _addressable(x: torch.Tensor) -> bool:
    """Whether its address says all about it: dense, and where a block may begin."""
    return x.is_contiguous() and x.storage_offset() % BLOCK == 0


def _batches(step: NpuStep, rows: int, triples: AdapterRows, store: VllmAdapterStore) -> tuple[Batch, ...]:
    """None where a row has several adapters, or a weight of its own, or an adapter has a rank that is not taken."""
    if len(np.unique(triples.rows)) != len(triples) or not bool(np.all(triples.weights == 1.0)):
        return ()
    slots = np.full(rows, -1, dtype=np.int64)
    slots[triples.rows] = triples.slots
    begins = np.flatnonzero(np.concatenate(([True], slots[1:] != slots[:-1])))
    runs, lengths = slots[begins], np.diff(np.append(begins, rows))
    ranges, members = store.ranges(), dict[tuple[int, int], list[int]]()
    for slot in dict.fromkeys(runs[runs >= 0].tolist()):
        where = ranges[slot]
        if where is None or where.rank_rows not in RANKS:
            return ()
        members.setdefault((where.rank_rows, where.first_rank_row % where.rank_rows), []).append(slot)
    found = []
    for (rank, offset), own in members.items():
        index = np.full(store.slots + 1, -1, dtype=np.int64)  # the last one is that of -1, no adapter
        for slot in own:
            where = ranges[slot]
            assert where is not None
            index[slot] = (where.first_rank_row - offset) // rank
        host = torch.empty((2, len(runs)), dtype=torch.int64, pin_memory=True)
        host.copy_(torch.from_numpy(np.stack((index[runs], lengths))))
        numbers = step.device.empty(tuple(host.shape), torch.int64)
        step.device.copy_(numbers, host)
        found.append(Batch(rows, rank, offset, tuple(own), numbers[0], numbers[1]))
    return tuple(found)
