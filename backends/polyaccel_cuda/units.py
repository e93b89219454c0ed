"""A step's adapters arranged for kernels: which rows share which slots, and where rank rows are found."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from polyaccel.backend import OperatorError, RowSet, StepInput, TokenClass
from polyaccel_cuda.adapter_store import CudaAdapterStore
from polyaccel_cuda.kernels import tiling
from polyaccel_cuda.kernels.few import gathers

Ints = np.ndarray
ROW_SETS: tuple[RowSet, ...] = ("tokens", "logits")
# Rows of a unit: as few as tensor cores take at decode, enough to share what is read at prefill.
UNIT_ROWS = {TokenClass.DECODE: 16, TokenClass.MIXED: 64}
# The same at decode and at prefill.
INVARIANT_ROWS = dict.fromkeys(TokenClass, UNIT_ROWS[TokenClass.DECODE])


def rows_of(inputs: StepInput, row_set: RowSet) -> int:
    """How many rows a row set has."""
    return inputs.tokens if row_set == "tokens" else len(inputs.logits_rows)


class RankRows:
    """Where the rank rows of a step's slots are.

    Attributes:
        first, rank: ``[slots + 1]`` int32, a slot's first rank row and how many it has; 0 of them where it is empty.
        place: ``[slots + 1]`` int32, where they begin in what a product leaves.
        listed: int32, the rank rows that the product takes, in order; empty if it takes all up to the last one named.
        covered: how many it takes.
        last: rank rows up to the last one that is named.
        segmented: each row has the rank rows of its own slots alone, one slot after the other; ``place`` is then a
            matter of the row, and ``covered`` the most that a row has.
    """

    def __init__(self, inputs: StepInput, store: CudaAdapterStore | None) -> None:
        ranges = [] if store is None else store.ranges()
        spans = np.array([(0, 0) if r is None else (r.first_rank_row, r.rank_rows) for r in ranges], dtype=np.int32)
        # One slot more, for rows without: a store may have none.
        self.first, self.rank = np.append(spans.reshape(-1, 2), np.zeros((1, 2), dtype=np.int32), axis=0).T
        named = np.unique(np.concatenate([inputs.rows(row_set).slots for row_set in ROW_SETS])).astype(np.int64)
        if store is None and len(named):
            raise OperatorError("begin_step", "the step names adapters but its state has no adapter store")
        first, rank = self.first[named], self.rank[named]
        self.last = int((first + rank).max(initial=0))
        self.place, self.listed, self.covered = self.first, np.zeros(0, dtype=np.int32), self.last
        if gathers(inputs.tokens):
            ends = np.cumsum(rank)
            self.place = np.zeros(len(ranges) + 1, dtype=np.int32)
            self.place[named] = ends - rank
            self.covered = int(rank.sum())
            self.listed = (np.repeat(first - (ends - rank), rank) + np.arange(self.covered)).astype(np.int32)
        self.segmented = (
            inputs.token_class is TokenClass.MIXED
            and not gathers(inputs.tokens)
            and self.last > tiling.FOLDED_RANK_ROWS
        )
        if self.segmented:
            self.covered = max(self._most_of_a_row(inputs, row_set) for row_set in ROW_SETS)

    def _most_of_a_row(self, inputs: StepInput, row_set: RowSet) -> int:
        given = inputs.rows(row_set)
        if not len(given):
            return 0
        width = len(self.rank)
        named = np.unique(given.rows.astype(np.int64) * width + given.slots)
        return int(np.bincount(named // width, weights=self.rank[named % width]).max())

    @property
    def tables(self) -> Mapping[str, Ints]:
        return {"first": self.first, "place": self.place, "rank": self.rank}


def units_of(
    inputs: StepInput, row_set: RowSet, where: RankRows, sizes: Mapping[TokenClass, int] = UNIT_ROWS
) -> Mapping[str, Ints]:
    """The tables of :class:`polyaccel_cuda.kernels.rows.Units` for a row set; units in order of their slots.
    ``sizes``: rows of a unit."""
    given, rows, size = inputs.rows(row_set), rows_of(inputs, row_set), sizes[inputs.token_class]
    if not len(given):
        return _without_adapters(rows, inputs.token_class, size)
    slots, weights = _by_row(given.rows, given.slots, given.weights, rows)
    tables = _units(slots, weights, where.tables, inputs.token_class, size)
    if where.segmented:
        tables = {**tables, "place": _places(tables["rank"], tables["more"])}
    return tables


def _places(rank: Ints, more: Ints) -> Ints:
    """Where each segment's rank rows are among those of its unit: the unit's own first, its others in order."""
    most = len(more) - 1
    others = np.cumsum(rank[most:]) - rank[most:]
    counts = np.diff(more)
    # Sums before a unit's first other segment are other units'.
    begins = np.repeat(np.append(others, 0)[more[:-1] - most], counts)
    places = np.zeros(len(rank), dtype=np.int32)
    places[most:] = np.repeat(rank[:most], counts) + others - begins
    return places


@functools.lru_cache(maxsize=64)
def _without_adapters(rows: int, token_class: TokenClass, size: int) -> Mapping[str, Ints]:
    # Most steps of an engine that could serve adapters have none at some row set; theirs differ in nothing else.
    none = np.full((rows, 1), -1, dtype=np.int64)
    nowhere = dict.fromkeys(("first", "place", "rank"), np.zeros(1, dtype=np.int32))
    return _units(none, np.zeros((rows, 1), dtype=np.float32), nowhere, token_class, size)


def _units(
    slots: Ints, weights: Ints, where: Mapping[str, Ints], token_class: TokenClass, size: int
) -> Mapping[str, Ints]:
    """From what :func:`_by_row` gives; ``where``: :attr:`RankRows.tables`."""
    rows = len(slots)
    if slots.shape[1] == 1:
        _, group = np.unique(slots[:, 0], return_inverse=True)
    else:
        _, group = np.unique(slots, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    begins = np.cumsum(sizes) - sizes
    # Whose turn in its group a row is, then which unit of the group and where in that.
    turn = np.arange(rows) - np.repeat(begins, sizes)
    counts = -(-sizes // size)
    first_unit = np.cumsum(counts) - counts
    unit = np.repeat(first_unit, sizes) + turn // size
    seat = turn % size
    total = int(counts.sum())
    # A graph's launches serve as many units as there can be, each row one; other launches those that there are.
    most = rows if token_class is TokenClass.DECODE else total
    members = np.full((most, size), -1, dtype=np.int32)
    members[unit, seat] = order
    own = slots[members[:, 0]]
    own[total:] = -1
    # The first slot of a unit's rows is its own segment; the i-th further one is the same column of the tables by row.
    which, column = np.nonzero(own[:, 1:] >= 0)
    owner = np.concatenate((np.arange(most), which))
    column = np.concatenate((np.zeros(most, dtype=np.int64), column + 1))
    slot = own[owner, column]
    named = slot >= 0
    more = np.full(most + 1, most, dtype=np.int32)
    more[1:] += np.cumsum(np.bincount(which, minlength=most)).astype(np.int32)
    member = members[owner]
    mix = np.where((member >= 0) & named[:, None], weights[member, column[:, None]], 0).astype(np.float32)
    return {
        "seats": np.concatenate(([total], unit * size + seat)).astype(np.int32),
        "members": members,
        **{name: np.where(named, table[slot], 0) for name, table in where.items()},
        "mix": mix,
        "more": more,
    }


def triples_of(inputs: StepInput, row_set: RowSet) -> Mapping[str, Ints]:
    """The tables of :class:`polyaccel_cuda.kernels.gather.Triples`."""
    given = inputs.rows(row_set)
    order = np.argsort(given.rows, kind="stable")
    return {
        "row_starts": np.searchsorted(given.rows[order], np.arange(rows_of(inputs, row_set) + 1)).astype(np.int32),
        "order": order.astype(np.int32),
        "slot": given.slots.astype(np.int64),
        "row": given.rows.astype(np.int64),
        "weight": given.weights,
    }


def _by_row(rows: Ints, slots: Ints, weights: Ints, count: int) -> tuple[Ints, Ints]:
    """Slots ``[count, most of a row]``, ascending, -1 beyond a row's own, and their weights; a slot that a row names
    twice has the sum of both."""
    width = int(slots.max()) + 1
    keys, which = np.unique(rows.astype(np.int64) * width + slots, return_inverse=True)
    sums = np.zeros(len(keys), dtype=np.float32)
    np.add.at(sums, which.reshape(-1), weights)
    row, slot = keys // width, keys % width
    begins = np.searchsorted(row, np.arange(count))
    column = np.arange(len(row)) - begins[row]
    found = np.full((count, int(column.max()) + 1), -1, dtype=np.int64)
    mix = np.zeros(found.shape, dtype=np.float32)
    found[row, column], mix[row, column] = slot, sums
    return found, mix
