"""A step on the device: metadata at fixed addresses by one copy, host lists for what attention wants of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from polyaccel.backend import (
    AdapterRows,
    AdapterStore,
    Device,
    DeviceState,
    OperatorError,
    RopeTable,
    RowSet,
    Step,
    StepInput,
    TokenClass,
)
from polyaccel.backend.step import DEVICE_ARRAYS, plan_key
from polyaccel_npu.adapter_store import NpuAdapterStore
from polyaccel_npu.arena import Arena, Field
from polyaccel_npu.attention_plan import AttentionPlan, KeyRoom, plan_attention
from polyaccel_npu.issue import Issuer
from polyaccel_npu.kv_cache import SPARE_BLOCKS, BlockKVCache

if TYPE_CHECKING:
    from polyaccel_npu.graph import HostCalls

ROW_SETS: tuple[RowSet, ...] = ("tokens", "logits")
_I32, _I64, _F32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stored:
    """Which tokens go where in the cache: ``slots: [m]`` int32, unique; ``rows: [m]`` int64, None for all tokens."""

    slots: torch.Tensor
    rows: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class GraphMode:
    """How operators treat the step of a capture: rank rows that its products cover, and who issues what takes numbers
    of the host."""

    rank_rows: int
    host: HostCalls


class NpuStep(Step):
    """A step as operators take it.

    Attributes:
        issuer: how to launch.
        graph: set while the step is being captured; None elsewhere, where segments are exact.
        last_rank_row: rank rows up to the last one that the step's adapters have.
        width: blocks in a row of the block tables where they lie.
    """

    def __init__(self, inputs: StepInput, state: DeviceState, arena: StepArena, device: Device, issuer: Issuer) -> None:
        self.input, self.state, self.arena = inputs, state, arena
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)
        self.issuer = issuer
        self.graph: GraphMode | None = None
        self.last_rank_row = _last_rank_row(inputs, state.adapters)
        self.width = arena.width
        self._device = device
        self.torch_device = device.torch_device
        self._angles: dict[int, tuple[RopeTable, Angles]] = {}
        self._attention: AttentionPlan | None = None
        self._masks: dict[int, torch.Tensor] = {}
        self._covers: dict[tuple[RowSet, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def forget(self) -> None:
        """Drop what operators made for this step: a capture makes it anew."""
        self._angles, self._attention, self._masks, self._covers = {}, None, {}, {}

    @classmethod
    def of(cls, operator: str, step: Step) -> NpuStep:
        """The step as this backend's own. Raises OperatorError for another's."""
        if not isinstance(step, cls):
            raise OperatorError(operator, f"takes a step of the npu backend, not {type(step).__name__}")
        return step

    def tensor(self, name: str) -> torch.Tensor:
        if name not in DEVICE_ARRAYS:
            raise OperatorError("Step.tensor", f"no array {name!r}; a step has {', '.join(DEVICE_ARRAYS)}")
        array = getattr(self.input, name)
        if name == "block_tables":
            return self.tables if self.graph is not None else self.tables[:, : array.shape[1]]
        found = self.arena.view(name, array.size)
        return found.view(array.shape) if array.ndim > 1 else found

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = len(self.input.rows(row_set))
        view = self.arena.view
        return view(f"{row_set}.row", count), view(f"{row_set}.slot", count), view(f"{row_set}.weight", count)

    # -- for operators -----------------------------------------------------------------------------------------------

    @property
    def tables(self) -> torch.Tensor:
        """``[sequences, width]`` int32, dense: the block tables with what room they have."""
        sequences = self.input.block_tables.shape[0]
        return self.arena.view("block_tables", sequences * self.width).view(sequences, self.width)

    @property
    def capacity(self) -> int:
        """Keys that a sequence can have in these block tables."""
        return self.width if self.state.kv is None else self.width * self.state.kv.spec.block_size

    def cover(self, row_set: RowSet, rank_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """By row and rank row: whether an adapter of the row has it, bool, and its mix, float32; both
        ``[rows, rank_rows]``. For graphs: where the adapters are is data."""
        found = self._covers.get((row_set, rank_rows))
        if found is None:
            store, issue = self.state.adapters, self.issuer.issue
            assert store is not None
            columns = store.slots + 1
            mixes = self.arena.view(f"{row_set}.mix", self.input.tokens * columns).view(-1, columns)
            owner = self.arena.view("owner", rank_rows)
            mix = issue("sgmv_cover", {"mix": mixes}, torch.ops.aten.index_select, mixes, 1, owner)
            own = issue("sgmv_own", {"mix": mix}, torch.ops.aten.ne, mix, 0.0)
            found = self._covers[row_set, rank_rows] = (own, mix)
        return found

    @property
    def device(self) -> Device:
        return self._device

    def adapters(self, row_set: RowSet) -> tuple[AdapterRows, AdapterStore] | None:
        """The row set's triples and the store; None without triples."""
        triples = self.input.rows(row_set)
        if not len(triples):
            return None
        store = self.state.adapters
        if store is None:
            raise OperatorError("sgmv", "the step names adapters but its state has no adapter store")
        return triples, store

    @property
    def key_room(self) -> KeyRoom | None:
        """What one call of FIA may read of the step's cache; None without one."""
        return self.state.kv.room if isinstance(self.state.kv, BlockKVCache) else None

    def attention(self) -> AttentionPlan:
        if self._attention is None:
            self._attention = plan_attention(self.input, self.key_room)
        return self._attention

    def stored(self) -> Stored:
        """Where this step's keys and values go. Tokens that are not stored are left out, or sent to spare slots where
        there is one for each."""
        count = self.arena.lengths["stored"]
        rows = None if count == self.input.tokens else self.arena.view("stored_rows", count)
        return Stored(self.arena.view("stored", count), rows)

    def angles(self, rope: RopeTable) -> Angles:
        """``cos, sin: [1, T, 1, rotary_dim]`` float32 at the step's positions, each pair's angle at both its places."""
        found = self._angles.get(id(rope.cos))
        if found is None or found[0].cos is not rope.cos:
            issue, positions = self.issuer.issue, self.tensor("positions")
            rows = []
            for table in (rope.cos, rope.sin):
                half = issue("rope_rows", {"table": table}, torch.ops.aten.index_select, table, 0, positions)
                both = [half, half] if rope.style == "half" else [half.unsqueeze(-1), half.unsqueeze(-1)]
                whole = issue("rope_rows", {"table": half}, torch.ops.aten.cat, both, -1)
                rows.append(whole.view(1, len(positions), 1, rope.rotary_dim))
            found = self._angles[id(rope.cos)] = (rope, (rows[0], rows[1]))
        return found[1]

    def window_mask(self, call_first: int, call_last: int, window: int, width: int) -> torch.Tensor:
        """``[sequences, 1, 1, width]`` bool: keys before the window of each sequence's last query, which is its end."""
        key = window * (1 << 40) + width
        mask = self._masks.get(key)
        if mask is None:
            issue, contexts = self.issuer.issue, self.tensor("context_lengths")
            positions = torch.arange(width, dtype=torch.int32, device=contexts.device)
            begins = issue("window", {"lengths": contexts}, torch.ops.aten.sub, contexts, window)
            hidden = (positions.unsqueeze(0), begins.unsqueeze(1))
            mask = issue("window", {"lengths": contexts}, torch.ops.aten.lt, *hidden)
            self._masks[key] = mask = mask.view(len(contexts), 1, 1, width)
        return mask[call_first:call_last]


class StepLoader:
    """Begins the steps of one device. Steps of one token class share their addresses."""

    def __init__(self, device: Device, issuer: Issuer) -> None:
        self._device, self._issuer = device, issuer
        self._arenas: dict[TokenClass, StepArena] = {}

    def begin(self, inputs: StepInput, state: DeviceState) -> NpuStep:
        arrays = _arrays(inputs, state)
        lengths = {name: array.size for name, array in arrays.items()}
        lengths["token_ids"] = inputs.tokens
        arena, blocks = self._arenas.get(inputs.token_class), inputs.block_tables.shape[1]
        if arena is None or arena.width < blocks or not arena.fits(lengths | _tables(inputs, arena.width)):
            width = _width(inputs, state)
            fields = _fields(lengths, inputs, state, width)
            arena = self._arenas[inputs.token_class] = StepArena(fields, self._device)
            arena.width = width
        if arena.width != blocks:
            arrays["block_tables"] = np.zeros((len(inputs.block_tables), arena.width), dtype=np.int32)
            arrays["block_tables"][:, :blocks] = inputs.block_tables
        arena.lengths = lengths
        arena.load(arrays)
        step = NpuStep(inputs, state, arena, self._device, self._issuer)
        self._resolve(inputs, state, arena)
        return step

    def _resolve(self, inputs: StepInput, state: DeviceState, arena: Arena) -> None:
        """Tokens that were sampled by a step before, from where that left them."""
        if not bool((inputs.token_ids < 0).any()):
            return
        sampling, issue = state.sampling, self._issuer.issue
        if sampling is None:
            raise OperatorError("begin_step", "token_ids name sampled tokens but the step has no sampling state")
        ids, sources = arena.view("token_ids", inputs.tokens), arena.view("sources", inputs.tokens)
        last = sampling.last_tokens()
        taken = issue("resolve_tokens", {"last": last}, torch.ops.aten.index_select, last, 0, sources)
        sampled = issue("resolve_tokens", {"ids": ids}, torch.ops.aten.lt, ids, 0)
        resolved = issue("resolve_tokens", {"ids": ids}, torch.ops.aten.where, sampled, taken, ids)
        issue("resolve_tokens", {"ids": ids}, torch.ops.aten.copy_, ids, resolved)


class StepArena(Arena):
    """An arena that knows how long the arrays of its step are.

    Attributes:
        lengths: elements by field.
        width: blocks in a row of the block tables.
    """

    lengths: dict[str, int]
    width: int


def _arrays(inputs: StepInput, state: DeviceState) -> dict[str, np.ndarray]:
    arrays = {name: getattr(inputs, name) for name in DEVICE_ARRAYS}
    arrays["sources"] = np.where(inputs.token_ids < 0, -1 - inputs.token_ids, 0)
    kept = np.flatnonzero(inputs.kv_slots >= 0)
    slots, dropped = inputs.kv_slots, inputs.tokens - len(kept)
    spec = None if state.kv is None else state.kv.spec
    if dropped and spec is not None:
        spare = -(-SPARE_BLOCKS * 128 // spec.block_size) * spec.block_size
        if inputs.token_class is TokenClass.DECODE and dropped <= spare:
            slots = slots.copy()
            slots[slots < 0] = spec.blocks * spec.block_size + np.arange(dropped)
            kept = np.arange(inputs.tokens)
    arrays["stored"], arrays["stored_rows"] = slots[kept].astype(np.int32), kept.astype(np.int64)
    for row_set in ROW_SETS:
        triples = inputs.rows(row_set)
        arrays[f"{row_set}.row"] = triples.rows.astype(np.int64)
        arrays[f"{row_set}.slot"] = triples.slots.astype(np.int64)
        arrays[f"{row_set}.weight"] = triples.weights.astype(np.float32)
    if inputs.token_class is TokenClass.DECODE and isinstance(state.adapters, NpuAdapterStore):
        arrays |= _covers(inputs, state.adapters)
    return arrays


def _covers(inputs: StepInput, store: NpuAdapterStore) -> dict[str, np.ndarray]:
    """``owner: [rank_rows]``, the slot that has each rank row, or one past the last; and for each row set the mix of
    each row's adapters, ``[rows, slots + 1]``, zero for all others."""
    found: dict[str, np.ndarray] = {"owner": np.full(store.rank_rows, store.slots, dtype=np.int64)}
    for slot, where in enumerate(store.ranges()):
        if where is not None:
            found["owner"][where.first_rank_row : where.first_rank_row + where.rank_rows] = slot
    for row_set in ROW_SETS:
        triples = inputs.rows(row_set)
        mixes = found[f"{row_set}.mix"] = np.zeros((inputs.tokens, store.slots + 1), dtype=np.float32)
        np.add.at(mixes, (triples.rows, triples.slots), triples.weights)
    return found


def _last_rank_row(inputs: StepInput, store: AdapterStore | None) -> int:
    if store is None or not inputs.has_adapters:
        return 0
    ranges = store.ranges()
    named = {int(slot) for rows in inputs.adapters.values() for slot in rows.segment_slots}
    return max((r.first_rank_row + r.rank_rows for slot in named if (r := ranges[slot]) is not None), default=0)


def _tables(inputs: StepInput, width: int) -> dict[str, int]:
    return {"block_tables": len(inputs.block_tables) * width}


def _width(inputs: StepInput, state: DeviceState) -> int:
    """Blocks in a row of the tables: as many as the step has, with room to grow in decode, whose addresses stay."""
    blocks = int(inputs.block_tables.shape[1])
    if inputs.token_class is TokenClass.DECODE and state.kv is not None:
        return max(blocks, min(2 * blocks + 8, state.kv.spec.blocks))
    return blocks


def _fields(lengths: dict[str, int], inputs: StepInput, state: DeviceState, width: int) -> list[Field]:
    rows = max(inputs.tokens, len(inputs.logits_rows), inputs.sequences, 1)
    if inputs.token_class is TokenClass.DECODE and state.sampling is not None:
        rows = max(rows, state.sampling.spec.request_slots)
    rows = 1 << (rows - 1).bit_length()
    triples = max(4 * rows, *(lengths[f"{row_set}.row"] for row_set in ROW_SETS))
    fields = [Field(name, _I64, rows) for name in ("token_ids", "positions", "kv_slots", "sources", "logits_rows")]
    fields += [Field("query_starts", _I32, rows + 1), Field("context_lengths", _I32, rows)]
    fields += [Field(name, _I32, rows) for name in ("request_slots", "stored")]
    fields += [Field("sample_slots", _I32, rows), Field("uniforms", _F32, rows), Field("stored_rows", _I64, rows)]
    for row_set in ROW_SETS:
        fields += [Field(f"{row_set}.{name}", _I64, triples) for name in ("row", "slot")]
        fields += [Field(f"{row_set}.weight", _F32, triples)]
    store = state.adapters
    if store is not None and "owner" in lengths:
        fields += [Field("owner", _I64, store.rank_rows)]
        fields += [Field(f"{row_set}.mix", _F32, rows * (store.slots + 1)) for row_set in ROW_SETS]
    return [*(_of(field, inputs) for field in fields), Field("block_tables", _I32, max(rows * width, 1))]


def _of(field: Field, inputs: StepInput) -> Field:
    """With the dtype that the step's own array has, which composites may rely on."""
    if field.name in DEVICE_ARRAYS:
        return Field(field.name, np.dtype(getattr(inputs, field.name).dtype), field.room)
    return field
