"""A step on the device: metadata at fixed addresses, adapters by row, tiles of queries; one copy a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from polyaccel.backend import Device, DeviceState, Launcher, OperatorError, RowSet, Step, StepInput, TokenClass
from polyaccel.backend.step import DEVICE_ARRAYS, plan_key
from polyaccel_cuda.adapter_store import CudaAdapterStore
from polyaccel_cuda.arena import Arena, Field
from polyaccel_cuda.kernels.few import gathers
from polyaccel_cuda.kernels.gather import Triples
from polyaccel_cuda.kernels.prefill import QUERY_TILE
from polyaccel_cuda.kernels.rows import Units, streams
from polyaccel_cuda.units import INVARIANT_ROWS, ROW_SETS, UNIT_ROWS, RankRows, rows_of, triples_of, units_of

TABLES = ("seats", "members", "first", "place", "rank", "mix", "more")
_I32, _I64, _F32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)


@triton.jit
def resolve_tokens_kernel(sources, last_tokens, ids, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    source = tl.load(sources + index, mask=inside, other=0)
    sampled = tl.load(last_tokens + (-1 - source), mask=inside & (source < 0), other=0)
    tl.store(ids + index, tl.where(source < 0, sampled, source), mask=inside)


def launch_once(device: torch.device) -> None:
    """Launch the kernel on nothing of anybody's, as specialised as for most steps: by a multiple of 16."""
    ids, last = torch.zeros(16, dtype=torch.int64, device=device), torch.zeros(16, dtype=torch.int64, device=device)
    resolve_tokens_kernel[(1,)](ids, last, ids, 16, BLOCK=256)


class CudaStep(Step):
    """A step as kernels take it.

    Attributes:
        rank_rows: rank rows that products cover; a graph's capture sets it to the graph's.
        last_rank_row: rank rows up to the last one that the step names.
        segmented: rank rows are counted within each row, and only those of its own adapters are made.
        tables, table_starts: block tables of all sequences one after the other, int32.
        tiles: sequence and first query of each tile of queries, int32, for sequences that are prefilled.
        decodes: sequences from the first on that have one query each; ``covered``: every token belongs to a sequence.
        longest: the longest context that these tables can hold.
        batch_invariant: no form of a sum may depend on what else is in the step.
        captured: a graph holds its calls.
    """

    def __init__(self, inputs: StepInput, state: DeviceState, arena: Arena, host: _Host, device: Device) -> None:
        self.input, self.state = inputs, state
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)
        self.rank_rows, self.last_rank_row = host.rank_rows, host.last_rank_row
        self.segmented = host.segmented
        self.arena = arena
        self.captured = False
        self._host, self._device = host, device
        self.torch_device = device.torch_device
        self._lengths = {name: array.size for name, array in host.arrays.items()} | {"token_ids": inputs.tokens}
        self._block_tables: torch.Tensor | None = None
        self._sites: dict[tuple[str, RowSet], Units] = {}

    @classmethod
    def of(cls, operator: str, step: Step) -> CudaStep:
        """The step as this backend's own. Raises OperatorError for another's."""
        if not isinstance(step, cls):
            raise OperatorError(operator, f"takes a step of the cuda backend, not {type(step).__name__}")
        return step

    def tensor(self, name: str) -> torch.Tensor:
        if name not in DEVICE_ARRAYS:
            raise OperatorError("Step.tensor", f"no array {name!r}; a step has {', '.join(DEVICE_ARRAYS)}")
        if name == "block_tables":
            # Kernels read them one after the other; only composites want a rectangle.
            if self._block_tables is None:
                self._block_tables = self._device.upload(np.ascontiguousarray(self.input.block_tables))
            return self._block_tables
        return self.arena.view(name, self._lengths[name])

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = len(self.input.rows(row_set))
        if not count:
            empty = self.arena.view("positions", 0)
            return empty, empty, self.arena.view("uniforms", 0)
        rows, slots = (self.arena.view(f"{row_set}.{name}", count) for name in ("row", "slot"))
        return rows, slots, self.arena.view(f"{row_set}.weight", count)

    # -- for kernels -------------------------------------------------------------------------------------------------

    @property
    def tables(self) -> torch.Tensor:
        return self.arena.view("tables", self._lengths["tables"])

    @property
    def table_starts(self) -> torch.Tensor:
        return self.arena.view("table_starts", self._lengths["table_starts"])

    @property
    def tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = self._lengths["tile_sequences"]
        return self.arena.view("tile_sequences", count), self.arena.view("tile_begins", count)

    @property
    def decodes(self) -> int:
        return self._host.decodes

    @property
    def covered(self) -> bool:
        return int(self.input.query_starts[-1]) == self.input.tokens

    @property
    def longest(self) -> int:
        return self._host.longest

    @property
    def batch_invariant(self) -> bool:
        return self._host.batch_invariant

    def store(self) -> CudaAdapterStore | None:
        found = self.state.adapters
        return found if isinstance(found, CudaAdapterStore) else None

    @property
    def listed(self) -> torch.Tensor | None:
        """int32, the rank rows that products take, at least :attr:`rank_rows`; None if they take the first ones."""
        store = self.store()
        return self.arena.view("listed", store.rank_rows) if store is not None and gathers(self.input.tokens) else None

    def units(self, site: str, row_set: RowSet) -> Units | None:
        """The row set's adapters at a site; None where no product needs to cover rank rows."""
        store = self.store()
        if store is None or not self.rank_rows or not store.covers(site):
            return None
        key = (site, row_set)
        found = self._sites.get(key)
        if found is None:
            room, view = self.arena.rooms, self.arena.view
            most = self._lengths[f"{row_set}.more"] - 1
            eager, arrays = self.input.token_class is TokenClass.MIXED, self._host.arrays
            found = self._sites[key] = Units(
                b=store.b[site],
                rows=self._host.unit,
                most=most,
                streamed=not eager and not self.batch_invariant and streams(most, self.rank_rows),
                largest=max(1, int(arrays[f"{row_set}.rank"].max(initial=0))) if eager else 0,
                batch_invariant=self.batch_invariant,
                mixed=not eager or int(arrays[f"{row_set}.more"][-1]) > most,
                **{name: view(f"{row_set}.{name}", room[f"{row_set}.{name}"]) for name in TABLES},
            )
        return found

    def triples(self, site: str, row_set: RowSet, store: CudaAdapterStore) -> Triples:
        """The row set's triples one by one."""
        view, count = self.arena.view, len(self.input.rows(row_set))
        return Triples(
            row_starts=view(f"{row_set}.row_starts", rows_of(self.input, row_set) + 1),
            order=view(f"{row_set}.order", count),
            slots=view(f"{row_set}.slot", count),
            weights=view(f"{row_set}.weight", count),
            spans=store.spans,
            ranks=store.ranks[site],
        )


@dataclass(frozen=True, slots=True)
class _Host:
    """What a step's arrays are, and what is known of them on the host."""

    arrays: Mapping[str, np.ndarray]
    rank_rows: int
    last_rank_row: int
    segmented: bool
    decodes: int
    longest: int
    unit: int
    batch_invariant: bool


class StepLoader:
    """Places steps of one device: decode steps at addresses that stay, so that graphs can be replayed.

    Args:
        batch_invariant: no form of a sum may depend on what else is in a step. Then a decode's queries are
            tiles like a prefill's.
    """

    def __init__(self, device: Device, launcher: Launcher, *, batch_invariant: bool = False) -> None:
        self._device, self._launcher, self._batch_invariant = device, launcher, batch_invariant
        self._unit_rows = INVARIANT_ROWS if batch_invariant else UNIT_ROWS
        self._arenas: dict[TokenClass, Arena] = {}

    def begin(self, inputs: StepInput, state: DeviceState) -> CudaStep:
        store = state.adapters
        if store is not None and not isinstance(store, CudaAdapterStore):
            raise OperatorError("begin_step", f"takes a CudaAdapterStore, not {type(store).__name__}")
        host = self._arrays(inputs, state, store)
        arena = self._arena(inputs, state, {name: array.size for name, array in host.arrays.items()})
        arena.load(host.arrays)
        self._resolve(inputs, state, arena)
        return CudaStep(inputs, state, arena, host, self._device)

    def _arrays(self, inputs: StepInput, state: DeviceState, store: CudaAdapterStore | None) -> _Host:
        arrays = {name: np.asarray(getattr(inputs, name)) for name in DEVICE_ARRAYS if name != "block_tables"}
        arrays["sources"] = arrays.pop("token_ids")
        where = RankRows(inputs, store)
        if store is not None:
            arrays["listed"] = np.zeros(store.rank_rows, dtype=np.int32)
            arrays["listed"][: len(where.listed)] = where.listed
            for row_set in ROW_SETS:
                tables = {**units_of(inputs, row_set, where, self._unit_rows), **triples_of(inputs, row_set)}
                arrays |= {f"{row_set}.{name}": array for name, array in tables.items()}
        decodes = 0 if self._batch_invariant else _decodes(inputs)
        sequences, begins = _tiles(inputs.query_starts, decodes)
        arrays["tile_sequences"], arrays["tile_begins"] = sequences, begins
        size = 1 if state.kv is None else state.kv.spec.block_size
        counts = -(-inputs.context_lengths.astype(np.int64) // size)
        starts = np.cumsum(counts) - counts
        used = np.arange(inputs.block_tables.shape[1]) < counts[:, None]
        arrays["table_starts"] = starts.astype(np.int32)
        arrays["tables"] = inputs.block_tables[used]
        longest = int(counts.max(initial=0)) * size
        unit = self._unit_rows[inputs.token_class]
        return _Host(arrays, where.covered, where.last, where.segmented, decodes, longest, unit, self._batch_invariant)

    def _arena(self, inputs: StepInput, state: DeviceState, lengths: dict[str, int]) -> Arena:
        lengths["token_ids"] = inputs.tokens
        arena = self._arenas.get(inputs.token_class)
        if arena is not None and arena.fits(lengths):
            return arena
        rows = max(inputs.tokens, len(inputs.logits_rows), inputs.sequences, 1)
        blocks = 0
        if inputs.token_class is TokenClass.DECODE:
            if state.sampling is not None:
                rows = max(rows, state.sampling.spec.request_slots)
            if state.kv is not None:
                # A block may be shared by several sequences; beyond twice their number the tables move.
                blocks = 2 * state.kv.spec.blocks
        rows = 1 << (rows - 1).bit_length()
        triples = max(4 * rows, *(lengths.get(f"{s}.{name}", 0) for s in ROW_SETS for name in ("order", "first")))
        tables, tiles = max(blocks, 2 * lengths["tables"], 64), max(2 * lengths["tile_begins"] + 16, rows)
        unit = self._unit_rows[inputs.token_class]
        fields = _fields(rows, lengths.get("listed", 0), triples, tables, tiles, unit)
        arena = self._arenas[inputs.token_class] = Arena(fields, self._device)
        return arena

    def _resolve(self, inputs: StepInput, state: DeviceState, arena: Arena) -> None:
        count = inputs.tokens
        ids, sources = arena.view("token_ids", count), arena.view("sources", count)
        if not count:
            return
        if state.sampling is None:
            if (inputs.token_ids < 0).any():
                raise OperatorError("begin_step", "token_ids name sampled tokens but the step has no sampling state")
            last = ids
        else:
            last = state.sampling.last_tokens()
        grid = (triton.cdiv(count, 256),)
        self._launcher.launch(
            "cuda.resolve_tokens",
            (sources, ids),
            lambda: resolve_tokens_kernel[grid](sources, last, ids, count, BLOCK=256),
        )


def _decodes(inputs: StepInput) -> int:
    """How many sequences from the first on have one query each."""
    lengths = np.diff(inputs.query_starts)
    other = np.flatnonzero(lengths != 1)
    return int(other[0]) if len(other) else len(lengths)


def _tiles(query_starts: np.ndarray, decodes: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(query_starts)[decodes:]
    counts = -(-lengths // QUERY_TILE)
    sequences = np.repeat(np.arange(len(counts)) + decodes, counts)
    begins = (np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)) * QUERY_TILE
    return sequences.astype(np.int32), begins.astype(np.int32)


def _fields(rows: int, listed: int, triples: int, tables: int, tiles: int, unit: int) -> list[Field]:
    fields = [Field(name, _I64, rows) for name in ("sources", "token_ids", "positions", "kv_slots")]
    fields += [Field(name, _I32, rows + 1) for name in ("query_starts", "context_lengths", "table_starts")]
    fields += [Field(name, _I32, rows) for name in ("request_slots", "logits_rows", "sample_slots")]
    fields += [Field("uniforms", _F32, rows), Field("listed", _I32, listed)]
    fields += [Field(name, _I32, tiles) for name in ("tile_sequences", "tile_begins")]
    for row_set in ROW_SETS:
        fields += [Field(f"{row_set}.{name}", _I32, rows + 1) for name in ("seats", "more", "row_starts")]
    for row_set in ROW_SETS:
        # Each row a unit, at worst.
        fields += [Field(f"{row_set}.members", _I32, rows * unit), Field(f"{row_set}.mix", _F32, triples * unit)]
        fields += [Field(f"{row_set}.{name}", _I32, triples) for name in ("first", "place", "rank", "order")]
        fields += [Field(f"{row_set}.{name}", _I64, triples) for name in ("slot", "row")]
        fields += [Field(f"{row_set}.weight", _F32, triples)]
    return [*fields, Field("tables", _I32, tables)]
