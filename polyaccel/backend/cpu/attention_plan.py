"""Which cache blocks a step's queries read, worked out on the host once for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend.cpu.decode_plan import DecodeBatch, DecodePlanner
from polyaccel.backend.kv_cache import KVSpec
from polyaccel.backend.step import StepInput


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """Queries ``begin:end``, equally many of each of ``sequences`` sequences: the last ones of ``keys`` keys.

    Blocks of keys that no query sees are left out. ``matrices``: of the keys, then of the values, one for each
    head of each block (:meth:`HeadMajorKVCache.copies`).
    """

    begin: int
    end: int
    sequences: int
    keys: int
    matrices: torch.Tensor

    @property
    def queries(self) -> int:
        """Of each sequence."""
        return (self.end - self.begin) // self.sequences


@dataclass(slots=True)
class _Run:
    """Consecutive sequences with equally many queries and keys."""

    begin: int
    end: int
    context: int
    tables: list[npt.NDArray[np.int32]]

    def takes(self, begin: int, end: int, context: int) -> bool:
        queries = (self.end - self.begin) // len(self.tables)
        return begin == self.end and end - begin == queries and context == self.context


class AttentionPlan:
    """The pieces of one ragged attention call.

    Attributes:
        tokens: rows of q.
        covered: no row is left out of the pieces.
    """

    def __init__(self, tokens: int, kv: KVSpec, heads: int, window: int | None) -> None:
        self.tokens = tokens
        self.window = window
        self.prefills: list[Prefill] = []
        self._decodes: list[tuple[int, int, npt.NDArray[np.int64], npt.NDArray[np.int32]]] = []
        self._kv = kv
        self._planner = DecodePlanner(kv, heads, window)
        self._batches: dict[torch.dtype, tuple[DecodeBatch, ...]] = {}
        self._masks: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self.covered = False

    @classmethod
    def of(cls, inputs: StepInput, kv: KVSpec, heads: int, window: int | None) -> AttentionPlan:
        plan = cls(inputs.tokens, kv, heads, window)
        starts, contexts = inputs.query_starts.tolist(), inputs.context_lengths.tolist()
        covered = 0
        run: _Run | None = None
        for first, last in _runs(starts, contexts):
            begin, end, context = starts[first], starts[last], contexts[first]
            if context == 0:
                continue
            if end - begin == last - first:
                lengths = inputs.context_lengths[first:last].astype(np.int64)
                plan._decodes.append((begin, end, lengths, inputs.block_tables[first:last]))
                covered += end - begin
            elif end > begin:
                # Queries before the first key see nothing.
                begin += max(0, end - begin - context)
                table = inputs.block_tables[first]
                if run is not None and run.takes(begin, end, context):
                    run.end = end
                    run.tables.append(table)
                else:
                    plan._add_prefill(run)
                    run = _Run(begin, end, context, [table])
                covered += end - begin
        plan._add_prefill(run)
        plan.covered = covered == inputs.tokens
        return plan

    def decode_batches(self, dtype: torch.dtype) -> tuple[DecodeBatch, ...]:
        """The sequences of one query each, as suits queries of this dtype."""
        found = self._batches.get(dtype)
        if found is None:
            batches = [batch for decode in self._decodes for batch in self._planner.batches(dtype, *decode)]
            found = self._batches[dtype] = tuple(batches)
        return found

    def mask(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, keys]``, 0 where a query sees a key and minus infinity elsewhere.

        The last query is at the last key; for fewer queries or keys take the last ones.
        """
        key = (rows, dtype)
        found = self._masks.get(key)
        if found is None:
            keys = max(piece.keys for piece in self.prefills)
            distance = torch.arange(rows).unsqueeze(1) - torch.arange(keys) + (keys - rows)
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            found = self._masks[key] = torch.zeros((rows, keys), dtype=dtype).masked_fill_(hidden, -torch.inf)
        return found

    def _add_prefill(self, run: _Run | None) -> None:
        if run is None:
            return
        size, sequences = self._kv.block_size, len(run.tables)
        queries = (run.end - run.begin) // sequences
        lowest = 0 if self.window is None else max(0, run.context - queries + 1 - self.window)
        low, high = lowest // size, -(-run.context // size)
        blocks = np.stack([table[low:high] for table in run.tables]).astype(np.int64)
        piece = Prefill(
            begin=run.begin,
            end=run.end,
            sequences=sequences,
            keys=run.context - low * size,
            matrices=self._planner.matrices(blocks),
        )
        self.prefills.append(piece)


def _runs(starts: list[int], contexts: list[int]) -> Iterator[tuple[int, int]]:
    """Sequences ``first:last``: maximal runs of one token each and some context, all others alone."""
    first, count = 0, len(starts) - 1

    def single(i: int) -> bool:
        return starts[i + 1] - starts[i] == 1 and contexts[i] > 0

    while first < count:
        last = first + 1
        if single(first):
            while last < count and single(last):
                last += 1
        yield first, last
        first = last
