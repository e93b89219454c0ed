"""Steps of problems: sequences, their blocks and the adapters of their rows, as the engine would send them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from polyaccel.backend import AdapterRows, RowSet, StepInput, TokenClass
from polyaccel_conformance.words import Source

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLOCK_ORDERS = ("ascending", "permuted", "shared")
"""How blocks are handed out: in order; in random order out of a larger pool; with the full blocks of a common prefix
shared between sequences, as a prefix cache does."""

SEGMENTS = ("one", "none", "gaps", "each", "runs", "last", "mixes", "cleared")
"""Which rows use which adapters, see :func:`adapter_rows`."""

MIXES = ("one", "power", "any")
"""Mix weights: 1; powers of two of either sign; anything in [-2, 2), zero included."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paging:
    """Where the tokens of sequences lie in a paged cache.

    Attributes:
        tables: ``[S, B]`` int32, unused entries 0.
        block_size: tokens in a block.
        blocks: blocks of the pool; some belong to nobody.
    """

    tables: npt.NDArray[np.int32]
    block_size: int
    blocks: int

    @classmethod
    def of(
        cls,
        source: Source,
        queries: Sequence[int],
        contexts: Sequence[int],
        block_size: int,
        order: str = "permuted",
        spare: int = 3,
    ) -> Paging:
        """Blocks for sequences of ``contexts`` tokens, of which the last ``queries`` are written by this step.

        ``order``: one of :data:`BLOCK_ORDERS`; ``spare``: unused blocks in the pool. Sequences share only full blocks
        that this step does not write to.
        """
        counts = [-(-context // block_size) for context in contexts]
        cached = [(context - query) // block_size for query, context in zip(queries, contexts, strict=True)]
        shared = [0] * len(counts)
        if order == "shared" and counts:
            # All take their common prefix from the sequence that has most of it.
            donor = int(np.argmax(cached))
            shared = [0 if i == donor else min(own, cached[donor]) for i, own in enumerate(cached)]
        own = [count - common for count, common in zip(counts, shared, strict=True)]
        blocks = max(sum(own) + spare, 1)
        free = np.arange(blocks) if order == "ascending" else source.permutation("blocks", blocks)
        tables = np.zeros((len(counts), max(counts, default=1) or 1), dtype=np.int32)
        taken = 0
        for i, (count, common, number) in enumerate(zip(counts, shared, own, strict=True)):
            tables[i, common:count] = free[taken : taken + number]
            taken += number
        for i, common in enumerate(shared):
            if common:
                tables[i, :common] = tables[donor, :common]
        return cls(tables=tables, block_size=block_size, blocks=blocks)

    def first_at_the_end(self, contexts: Sequence[int]) -> Paging:
        """The same with the first sequence's last block at the end of the pool, and what was there in its place."""
        counts = [-(-context // self.block_size) for context in contexts]
        used = np.arange(self.tables.shape[1]) < np.array(counts)[:, None]
        one, last = self.tables[0, counts[0] - 1], self.blocks - 1
        moved = np.select([self.tables == one, self.tables == last], [last, one], self.tables)
        return replace(self, tables=np.where(used, moved, 0).astype(np.int32))

    def slots(self, sequence: int, begin: int, end: int) -> Ints:
        """KV slots of tokens ``begin:end`` of a sequence."""
        index = np.arange(begin, end)
        table = self.tables[sequence].astype(np.int64)
        slots: Ints = table[index // self.block_size] * self.block_size + index % self.block_size
        return slots


def build_step(
    source: Source,
    queries: Sequence[int],
    *,
    contexts: Sequence[int] | None = None,
    paging: Paging | None = None,
    token_ids: npt.ArrayLike | None = None,
    positions: npt.ArrayLike | None = None,
    unstored: Iterable[int] = (),
    request_slots: Sequence[int] | None = None,
    logits_rows: npt.ArrayLike | None = None,
    uniforms: npt.ArrayLike | None = None,
    adapters: Mapping[RowSet, AdapterRows] | None = None,
    decode: bool = False,
) -> StepInput:
    """A step of sequences with ``queries`` tokens each, the last ones of their ``contexts``.

    Args:
        source: of the uniforms where none are given.
        contexts: tokens of each sequence, this step's included; by default those of this step.
        paging: of the KV cache; by default no token is stored (slot -1) and tables hold one zero.
        token_ids: ``[T]``, by default 0; negative ones name request slots.
        positions: ``[T]``, by default each token's index in its sequence.
        unstored: tokens whose key and value are not stored (slot -1).
        request_slots: of the sequences, by default their numbers.
        logits_rows: tokens whose logits are needed, by default the last of each sequence that has one.
        uniforms: ``[R]`` in [0, 1), rounded down to 24 bits.
        adapters: triples by row set.
        decode: the step's class is decode, which needs one token and one row of logits a sequence.

    Raises:
        ValueError: sizes that do not fit together.
    """
    contexts = list(queries) if contexts is None else list(contexts)
    starts = np.cumsum([0, *queries])
    tokens = int(starts[-1])
    index = [np.arange(c - q, c, dtype=np.int64) for q, c in zip(queries, contexts, strict=True)]
    if any(c < q for q, c in zip(queries, contexts, strict=True)):
        raise ValueError(f"contexts {contexts} are shorter than their queries {list(queries)}")
    own = np.concatenate([np.zeros(0, dtype=np.int64), *index])
    tables = np.zeros((len(contexts), 1), dtype=np.int32)
    kv_slots = np.full(tokens, -1, dtype=np.int64)
    if paging is not None:
        tables = paging.tables
        written = [paging.slots(i, c - q, c) for i, (q, c) in enumerate(zip(queries, contexts, strict=True))]
        kv_slots = np.concatenate([np.zeros(0, dtype=np.int64), *written])
    kv_slots[list(unstored)] = -1
    sequence_of = np.repeat(np.arange(len(contexts)), queries)
    if logits_rows is None:
        logits_rows = [int(end) - 1 for begin, end in itertools.pairwise(starts) if end > begin]
    rows = np.asarray(logits_rows, dtype=np.int32)
    if decode and not (all(q == 1 for q in queries) and np.array_equal(rows, np.arange(tokens))):
        raise ValueError("a decode step has one token and one row of logits a sequence")
    slots = np.asarray(range(len(contexts)) if request_slots is None else request_slots, dtype=np.int32)
    drawn = source.uniform("uniforms", (len(rows),)) if uniforms is None else np.asarray(uniforms, dtype=np.float64)
    return StepInput(
        token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
        token_ids=np.zeros(tokens, dtype=np.int64) if token_ids is None else np.asarray(token_ids, dtype=np.int64),
        positions=own if positions is None else np.asarray(positions, dtype=np.int64),
        query_starts=starts.astype(np.int32),
        context_lengths=np.asarray(contexts, dtype=np.int32),
        block_tables=tables,
        kv_slots=kv_slots,
        request_slots=slots,
        logits_rows=rows,
        sample_slots=slots[sequence_of[rows]] if len(rows) else np.zeros(0, dtype=np.int32),
        # Rounding to nearest could give 1.
        uniforms=(np.floor(drawn * 2.0**24) * 2.0**-24).astype(np.float32),
        adapters=dict(adapters or {}),
    )


def row_step(
    source: Source,
    rows: int,
    *,
    row_set: RowSet = "tokens",
    decode: bool = False,
    adapters: AdapterRows | None = None,
    others: AdapterRows | None = None,
    token_ids: npt.ArrayLike | None = None,
) -> StepInput:
    """A step for an operator on ``rows`` rows of a row set; no KV cache.

    Args:
        decode: every row is a sequence with one token; otherwise sequences are ragged.
        adapters: triples of the row set.
        others: triples of the other row set (tokens for logits, logits for tokens), which must have no effect.
        token_ids: ``[T]`` for row set tokens.
    """
    triples: dict[RowSet, AdapterRows] = {}
    if adapters is not None and len(adapters):
        triples[row_set] = adapters
    if others is not None and len(others):
        triples["logits" if row_set == "tokens" else "tokens"] = others
    if decode:
        return build_step(source, [1] * rows, token_ids=token_ids, adapters=triples, decode=True)
    if row_set == "logits":
        # One row of logits a sequence, which is not its only token.
        queries = source.integers("queries", (rows,), 1, 3).tolist()
        return build_step(source, queries, token_ids=token_ids, adapters=triples)
    last = min(rows, 3)
    queries = [rows - last, last] if rows > last else [rows]
    return build_step(source, queries, token_ids=token_ids, adapters=triples)


def adapter_rows(
    source: Source, rows: int, slots: Sequence[int], pattern: str, mix: str = "one", *, empty_slot: int | None = None
) -> AdapterRows:
    """Triples for ``rows`` rows over the filled ``slots``.

    Args:
        pattern: ``one``: all rows use one adapter. ``none``: no row has any. ``gaps``: rows 0, 3, 6, ... have none.
            ``each``: neighbouring rows use different adapters, so that no segment's rows are consecutive. ``runs``:
            runs of rows in random order of slots; some are of length zero, some have no adapter, slots return.
            ``last``: only the last row has one, the last slot. ``mixes``: rows use up to three adapters at once.
            ``cleared``: as ``gaps``, and every other row that has an adapter names the ``empty_slot``.
        mix: one of :data:`MIXES`.
        empty_slot: a slot that holds nothing.
    """
    chosen = _CHOICES[pattern](source, rows, list(slots), empty_slot)
    chosen.sort()
    weights = _mix_weights(source, len(chosen), mix)
    return AdapterRows.build(
        np.array([row for row, _ in chosen], dtype=np.int32),
        np.array([slot for _, slot in chosen], dtype=np.int32),
        weights.astype(np.float32),
    )


def _mix_weights(source: Source, count: int, mix: str) -> Floats:
    if mix == "one":
        return np.ones(count)
    if mix == "power":
        sign = 1 - 2 * source.integers("mix sign", (count,), 0, 1)
        power = np.ldexp(sign.astype(np.float64), source.integers("mix", (count,), -2, 1))
        return np.asarray(power, dtype=np.float64)
    weights = np.asarray(source.integers("mix", (count,), -(2**20), 2**20 - 1) * 2.0**-19, dtype=np.float64)
    weights[::5] = 0.0
    return weights


Pairs = list[tuple[int, int]]


def _one(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    return [(row, slots[0]) for row in range(rows)] if slots else []


def _none(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    return []


def _gaps(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    used = [row for row in range(rows) if row % 3]
    return [(row, slots[i * len(slots) // len(used)]) for i, row in enumerate(used)] if slots else []


def _each(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    return [(row, slots[row % len(slots)]) for row in range(rows)] if slots else []


def _runs(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    if not slots:
        return []
    lengths = source.integers("run lengths", (rows + 1,), 0, 4).tolist()
    owners = source.integers("run slots", (rows + 1,), -1, len(slots) - 1).tolist()
    pairs: Pairs = []
    row = 0
    for length, owner in zip(lengths, owners, strict=True):
        end = min(row + length, rows)
        if owner >= 0:
            pairs += [(r, slots[owner]) for r in range(row, end)]
        row = end
    return pairs


def _last(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    return [(rows - 1, max(slots))] if rows and slots else []


def _mixes(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    if not slots:
        return []
    counts = source.integers("mix counts", (rows,), 0, min(3, len(slots))).tolist()
    first = source.integers("mix slots", (rows,), 0, len(slots) - 1).tolist()
    return [
        (row, slots[(start + i) % len(slots)])
        for row, (count, start) in enumerate(zip(counts, first, strict=True))
        for i in range(count)
    ]


def _cleared(source: Source, rows: int, slots: list[int], empty: int | None) -> Pairs:
    pairs = _gaps(source, rows, slots, empty)
    return pairs if empty is None else [(row, empty if i % 2 else slot) for i, (row, slot) in enumerate(pairs)]


_CHOICES: Mapping[str, Callable[[Source, int, list[int], int | None], Pairs]] = MappingProxyType(
    {
        "one": _one,
        "none": _none,
        "gaps": _gaps,
        "each": _each,
        "runs": _runs,
        "last": _last,
        "mixes": _mixes,
        "cleared": _cleared,
    }
)
