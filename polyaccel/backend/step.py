"""One iteration of the engine as the backend sees it.

``StepInput`` is a frozen bundle of host numpy arrays. ``Backend.begin_step`` is the only place where metadata reaches
the device, once a step; operators get the resulting opaque :class:`Step`. No operator reads from the device inside a
step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from polyaccel.backend.placed import Placed

if TYPE_CHECKING:
    from polyaccel.backend.adapter_store import AdapterStore
    from polyaccel.backend.kv_cache import KVCache
    from polyaccel.backend.sampling import SamplingState

RowSet = Literal["tokens", "logits", "vision"]


class TokenClass(Enum):
    """What a plan distinguishes: pure decode (one token a sequence), and everything else."""

    DECODE = "decode"
    MIXED = "mixed"


def _empty(dtype: type[np.generic]) -> np.ndarray:
    return np.zeros(0, dtype=dtype)


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """(row, slot, weight) triples of one row set, ordered by slot, then row.

    Rows without an adapter do not appear; a row with a weighted mix appears once for each adapter. ``segments`` are the
    runs of equal slot in triple order: triples ``starts[i]:starts[i + 1]`` use slot ``segment_slots[i]``.
    """

    rows: np.ndarray = field(default_factory=lambda: _empty(np.int32))
    slots: np.ndarray = field(default_factory=lambda: _empty(np.int32))
    weights: np.ndarray = field(default_factory=lambda: _empty(np.float32))
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int32))
    segment_slots: np.ndarray = field(default_factory=lambda: _empty(np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def build(cls, rows: np.ndarray, slots: np.ndarray, weights: np.ndarray) -> AdapterRows:
        """Order triples by slot (stable) and find the segments. ``rows, slots`` int32, ``weights`` float32."""
        if len(rows) == 0:
            return cls()
        if len(slots) > 1 and np.any(slots[1:] < slots[:-1]):
            order = np.argsort(slots, kind="stable")
            rows, slots, weights = rows[order], slots[order], weights[order]
        cuts = np.flatnonzero(slots[1:] != slots[:-1]) + 1
        starts = np.concatenate(([0], cuts, [len(slots)])).astype(np.int32)
        return cls(rows=rows, slots=slots, weights=weights, starts=starts, segment_slots=slots[starts[:-1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """Everything the device needs to know for one step. All arrays are host arrays that the step owns.

    Shapes: T tokens, S sequences, R rows of logits.

    Attributes:
        token_class: decode (T == S == R, one token each) or mixed.
        token_ids: ``[T]`` int64; an id, or ``-1 - s`` for the last token sampled in request slot ``s``.
        positions: ``[T]`` int64, explicit (rotary positions need not be the index in the sequence).
        query_starts: ``[S + 1]`` int32; tokens ``query_starts[i]:query_starts[i + 1]`` belong to sequence i.
        context_lengths: ``[S]`` int32; keys each sequence attends to, this step's tokens included.
        block_tables: ``[S, B]`` int32; blocks in order, unused entries 0.
        kv_slots: ``[T]`` int64; where each token's key and value are stored, -1 for a padding token.
        request_slots: ``[S]`` int32; row of the sampling state of each sequence.
        logits_rows: ``[R]`` int32; tokens whose logits are needed, ascending.
        sample_slots: ``[R]`` int32; request slot of each of those rows.
        uniforms: ``[R]`` float32 in [0, 1); the random number of each row (0 where greedy).
        adapters: triples by row set; ``logits`` rows index ``logits_rows``.
    """

    token_class: TokenClass
    token_ids: np.ndarray
    positions: np.ndarray
    query_starts: np.ndarray
    context_lengths: np.ndarray
    block_tables: np.ndarray
    kv_slots: np.ndarray
    request_slots: np.ndarray
    logits_rows: np.ndarray
    sample_slots: np.ndarray
    uniforms: np.ndarray
    adapters: dict[RowSet, AdapterRows] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def sequences(self) -> int:
        return len(self.context_lengths)

    @property
    def has_adapters(self) -> bool:
        return any(len(rows) > 0 for rows in self.adapters.values())

    def rows(self, row_set: RowSet) -> AdapterRows:
        return self.adapters.get(row_set) or AdapterRows()


# The per-step arrays that begin_step places on the device, by the names under which composites ask for them.
DEVICE_ARRAYS: tuple[str, ...] = (
    "token_ids",
    "positions",
    "query_starts",
    "context_lengths",
    "block_tables",
    "kv_slots",
    "request_slots",
    "logits_rows",
    "sample_slots",
    "uniforms",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """What outlives a step on one device and may be named by it."""

    kv: KVCache | None = None
    adapters: AdapterStore | None = None
    sampling: SamplingState | None = None


class Step(Placed, ABC):
    """A step on a device. Opaque to the core; backends subclass it freely.

    Composites and the core's station bodies use only what is declared here.
    """

    input: StepInput
    state: DeviceState
    plan_key: int
    """``2 * (class is mixed) + has_adapters``: which column of the dispatch plan applies."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A device tensor of :data:`DEVICE_ARRAYS`; ``token_ids`` with every token source resolved to an id."""

    @abstractmethod
    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Device copies of a row set's triples: rows int64, slots int64, weights float32."""


def plan_key(token_class: TokenClass, has_adapters: bool) -> int:
    return 2 * (token_class is TokenClass.MIXED) + has_adapters
