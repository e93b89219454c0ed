"""How a tensor is cut over ranks: pure functions on integers.

Every module that splits anything (weights, adapters, KV cache) asks here, so that all ranks and all parts of a rank
agree on who holds which rows. Nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from polyaccel.backend.errors import ConfigurationError

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows (or columns) of a whole tensor that one rank holds: ordered, disjoint, half-open, non-empty ranges.

    Raises:
        ConfigurationError: ranges that are empty, negative, overlapping or out of order.
    """

    ranges: Ranges = ()

    def __post_init__(self) -> None:
        end = 0
        for start, stop in self.ranges:
            if start < end or stop <= start:
                raise ConfigurationError(f"ranges {self.ranges} are not ordered, disjoint and non-empty")
            end = stop

    @classmethod
    def span(cls, start: int, stop: int) -> Rows:
        """The one range ``start : stop``, or no rows where it is empty."""
        return cls(((start, stop),)) if stop > start else cls()

    @classmethod
    def whole(cls, n: int) -> Rows:
        """All of a dimension of ``n``."""
        return cls.span(0, n)

    @property
    def size(self) -> int:
        """Number of rows held."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def end(self) -> int:
        """One past the last row held; 0 where none is."""
        return self.ranges[-1][1] if self.ranges else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.ranges)

    def scaled(self, factor: int) -> Rows:
        """The same cut where each row stands for ``factor`` rows (heads to rows of a projection)."""
        if factor < 1:
            raise ConfigurationError(f"a cut is scaled by {factor}; the factor is at least 1")
        return Rows(tuple((start * factor, stop * factor) for start, stop in self.ranges))

    def take(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """These rows of ``tensor`` along ``dim``, in order. A view where they are one range, a copy where several.

        Raises:
            ConfigurationError: the tensor is too short along ``dim``.
        """
        if self.end > tensor.shape[dim]:
            raise ConfigurationError(
                f"rows up to {self.end} are taken from dimension {dim} of a tensor of shape {list(tensor.shape)}"
            )
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in self.ranges]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)


def _check_rank(world_size: int, rank: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigurationError(f"rank {rank} of a world of {world_size}: the rank must be in 0..world_size-1")


def _share(units: int, world_size: int, rank: int) -> tuple[int, int]:
    each, extra = divmod(units, world_size)
    start = rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def even_cut(n: int, world_size: int, rank: int, *, multiple: int = 1) -> Rows:
    """This rank's part of a dimension of ``n``, cut at multiples of ``multiple`` only.

    Sizes differ by at most one multiple, larger parts first. Where ``n`` is no multiple the last part that is not
    empty is ragged. Ranks beyond the number of multiples hold nothing.
    """
    _check_rank(world_size, rank)
    if n < 0 or multiple < 1:
        raise ConfigurationError(f"cannot cut a dimension of {n} at multiples of {multiple}")
    start, stop = _share(-(-n // multiple), world_size, rank)
    return Rows.span(start * multiple, min(stop * multiple, n))


def vocabulary_cut(n: int, world_size: int, rank: int) -> tuple[Rows, int]:
    """This rank's rows of a vocabulary of ``n`` and the size every rank's shard is padded to, ``ceil(n / world_size)``.

    Equal shards make the gathered logits one plain all-gather. The last shards may be short or empty.
    """
    _check_rank(world_size, rank)
    if n < 1:
        raise ConfigurationError(f"a vocabulary of {n} entries cannot be cut")
    padded = -(-n // world_size)
    return Rows.span(min(rank * padded, n), min((rank + 1) * padded, n)), padded


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCut:
    """The attention heads of one rank: half-open ranges of whole-model head numbers.

    ``kv_copies`` is how many ranks hold this rank's KV heads (1: nobody else does). Every query head sits beside its
    own KV head, and the number of query heads per KV head is uniform on the rank.
    """

    num_heads: int
    num_kv_heads: int
    world_size: int
    rank: int
    q_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    kv_copies: int

    @property
    def num_q(self) -> int:
        """Query heads on this rank."""
        return self.q_heads[1] - self.q_heads[0]

    @property
    def num_kv(self) -> int:
        """KV heads on this rank, copies included."""
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def heads_per_kv(self) -> int:
        """Query heads per KV head on this rank."""
        return self.num_q // self.num_kv

    def q_rows(self, head_dim: int) -> Rows:
        """Rows of the query projection ``[num_heads * head_dim, hidden]``; also the output projection's columns."""
        return Rows.span(*self.q_heads).scaled(head_dim)

    def kv_rows(self, head_dim: int) -> Rows:
        """Rows of the key or value projection ``[num_kv_heads * head_dim, hidden]``."""
        return Rows.span(*self.kv_heads).scaled(head_dim)


def head_cut(num_heads: int, num_kv_heads: int, world_size: int, rank: int) -> HeadCut:
    """Cut attention heads by whole KV groups first.

    With at most as many ranks as groups, each rank holds whole groups, as evenly as possible. With more, the ranks are
    spread over the groups, a group's query heads are cut among its ranks and its KV head is copied to each of them.

    Raises:
        ConfigurationError: more ranks than query heads, or query heads that do not divide into the KV heads.
    """
    _check_rank(world_size, rank)
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ConfigurationError(
            f"{num_heads} query heads do not divide into {num_kv_heads} key/value heads; the model's config is wrong"
        )
    if world_size > num_heads:
        raise ConfigurationError(
            f"tensor_parallel_size={world_size} exceeds the model's {num_heads} query heads; use at most {num_heads}"
        )
    group = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        first, last = _share(num_kv_heads, world_size, rank)
        q_heads, kv_heads, copies = (first * group, last * group), (first, last), 1
    else:
        kv, piece, copies = _group_of(num_kv_heads, world_size, rank)
        start, stop = _share(group, copies, piece)
        q_heads, kv_heads = (kv * group + start, kv * group + stop), (kv, kv + 1)
    return HeadCut(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        world_size=world_size,
        rank=rank,
        q_heads=q_heads,
        kv_heads=kv_heads,
        kv_copies=copies,
    )


def _group_of(groups: int, world_size: int, rank: int) -> tuple[int, int, int]:
    """Group of a rank, its place among the group's ranks and their number; the last groups get the extra ranks."""
    each, extra = divmod(world_size, groups)
    small = (groups - extra) * each
    if rank < small:
        return rank // each, rank % each, each
    group, piece = divmod(rank - small, each + 1)
    return groups - extra + group, piece, each + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedHeadCut:
    """A :class:`HeadCut` for a backend that needs equal shapes on all ranks.

    The rank's real heads come first in their usual order, then heads of zeros (zero rows in the query, key and value
    projections, zero columns in the output projection, adapters alike) up to ``padded_q`` and ``padded_kv``, which
    are the same on every rank.
    """

    real: HeadCut
    padded_q: int
    padded_kv: int

    @property
    def zero_q(self) -> int:
        """Query heads of zeros on this rank."""
        return self.padded_q - self.real.num_q

    @property
    def zero_kv(self) -> int:
        """KV heads of zeros on this rank."""
        return self.padded_kv - self.real.num_kv


def padded_head_cut(num_heads: int, num_kv_heads: int, world_size: int, rank: int) -> PaddedHeadCut:
    """:func:`head_cut` padded to the largest rank's shape. Raises as it does."""
    cuts = [head_cut(num_heads, num_kv_heads, world_size, other) for other in range(world_size)]
    _check_rank(world_size, rank)
    return PaddedHeadCut(
        real=cuts[rank],
        padded_q=max(cut.num_q for cut in cuts),
        padded_kv=max(cut.num_kv for cut in cuts),
    )
