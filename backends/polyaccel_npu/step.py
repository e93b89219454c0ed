"""A step on the device: metadata at fixed addresses by one copy, host lists for what attention wants of them."""

from __future__ import annotations

from dataclasses import dataclass

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
from polyaccel_npu.arena import Arena, Field
from polyaccel_npu.attention_plan import AttentionPlan, plan_attention
from polyaccel_npu.issue import Issuer
from polyaccel_npu.kv_cache import SPARE_BLOCKS

ROW_SETS: tuple[RowSet, ...] = ("tokens", "logits")
_I32, _I64, _F32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stored:
    """Which tokens go where in the cache: ``slots: [m]`` int32, unique; ``rows: [m]`` int64, None for all tokens."""

    slots: torch.Tensor
    rows: torch.Tensor | None


class NpuStep(Step):
    """A step as operators take it.

    Attributes:
        issuer: how to launch.
        graph_rank_rows: rank rows that a graph's products cover; None outside of graphs, where segments are exact.
    """

    def __init__(self, inputs: StepInput, state: DeviceState, arena: StepArena, device: Device, issuer: Issuer) -> None:
        self.input, self.state, self.arena = inputs, state, arena
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)
        self.issuer = issuer
        self.graph_rank_rows: int | None = None
        self._device = device
        self.torch_device = device.torch_device
        self._angles: dict[int, tuple[RopeTable, Angles]] = {}
        self._attention: AttentionPlan | None = None
        self._masks: dict[int, torch.Tensor] = {}

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
        found = self.arena.view(name, array.size)
        return found.view(array.shape) if array.ndim > 1 else found

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = len(self.input.rows(row_set))
        view = self.arena.view
        return view(f"{row_set}.row", count), view(f"{row_set}.slot", count), view(f"{row_set}.weight", count)

    # -- for operators -----------------------------------------------------------------------------------------------

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

    def attention(self) -> AttentionPlan:
        if self._attention is None:
            self._attention = plan_attention(self.input, self.graph_rank_rows is not None)
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
        arena = self._arenas.get(inputs.token_class)
        if arena is None or not arena.fits(lengths):
            arena = self._arenas[inputs.token_class] = StepArena(_fields(lengths, inputs, state), self._device)
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
    """

    lengths: dict[str, int]


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
    return arrays


def _fields(lengths: dict[str, int], inputs: StepInput, state: DeviceState) -> list[Field]:
    rows = max(inputs.tokens, len(inputs.logits_rows), inputs.sequences, 1)
    tables = max(lengths["block_tables"], 1)
    if inputs.token_class is TokenClass.DECODE:
        if state.sampling is not None:
            rows = max(rows, state.sampling.spec.request_slots)
        if state.kv is not None and inputs.sequences:
            # Tables are as wide as the longest context: leave room for it to grow.
            width = inputs.block_tables.shape[1] if inputs.block_tables.ndim > 1 else 1
            tables = max(tables, rows * min(2 * width + 8, state.kv.spec.blocks))
    rows = 1 << (rows - 1).bit_length()
    triples = max(4 * rows, *(lengths[f"{row_set}.row"] for row_set in ROW_SETS))
    fields = [Field(name, _I64, rows) for name in ("token_ids", "positions", "kv_slots", "sources", "logits_rows")]
    fields += [Field("query_starts", _I32, rows + 1), Field("context_lengths", _I32, rows)]
    fields += [Field(name, _I32, rows) for name in ("request_slots", "stored")]
    fields += [Field("sample_slots", _I32, rows), Field("uniforms", _F32, rows), Field("stored_rows", _I64, rows)]
    for row_set in ROW_SETS:
        fields += [Field(f"{row_set}.{name}", _I64, triples) for name in ("row", "slot")]
        fields += [Field(f"{row_set}.weight", _F32, triples)]
    return [*(_of(field, inputs) for field in fields), Field("block_tables", _I32, tables)]


def _of(field: Field, inputs: StepInput) -> Field:
    """With the dtype that the step's own array has, which composites may rely on."""
    if field.name in DEVICE_ARRAYS:
        return Field(field.name, np.dtype(getattr(inputs, field.name).dtype), field.room)
    return field
