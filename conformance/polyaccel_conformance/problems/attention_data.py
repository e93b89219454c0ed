"""Queries, keys and values of attention.

Exact ones (``selection``): keys are codes of +-1, neighbours differ in one place of the code; a query chooses a key, or
all keys that agree in some places, by a score of zero against at most -160 for the others. The weights are then 1 and 0
to the last bit, and the output is the mean of one, two or four rows of integers. The chosen keys' neighbours beyond
the mask would be chosen too, if they were seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import format_of
from polyaccel_conformance.problem import Problem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

EXACT = "selection"
KINDS = ("normal", EXACT, "peaked", "flat", "positive", "outliers", "nonfinite")

# Scores of keys that are not chosen, in units of 1 over the scale. A power of two, at least 160 below zero.
GAP = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Keys and values of one sequence, ``[context, kv_heads, head_dim]``; ``codes: [context, kv_heads]`` where keys are
    chosen by them."""

    k: Floats
    v: Floats
    codes: Ints
    places: Ints


class AttentionData:
    """Draws queries, keys and values of a case."""

    def __init__(self, problem: Problem, scale: float, longest: int) -> None:
        case = problem.case
        self.source, self.kind, self.dtype = problem.source, case.data, case.dtype
        self.heads, self.kv_heads = case.dim("kv_heads") * case.dim("group"), case.dim("kv_heads")
        self.head_dim = case.dim("head_dim")
        self.scale = scale
        self.bits = code_bits(longest)
        # Values are integers; the sum of four of them is representable in the output, and does not fit into TF32 where
        # that is not permitted.
        self.limit = 2 ** (min(format_of(case.dtype).bits, 16) - 2) - 1

    def keys(self, name: str, context: int) -> Keys:
        """All different. ``name`` tells sequences apart."""
        shape = (context, self.kv_heads, self.head_dim)
        if self.kind == EXACT:
            return self._codes(name, shape)
        k, v = self.source.normal(f"{name} k", shape), self.source.normal(f"{name} v", shape)
        if self.kind == "positive":
            v = np.abs(v)
        elif self.kind == "outliers":
            v[..., self.source.choose("hot", self.head_dim, max(self.head_dim // 64, 1))] *= 32
        codes = np.zeros(shape[:2], dtype=np.int64)
        return Keys(k=self._rounded(k), v=self._rounded(v), codes=codes, places=np.zeros(0, dtype=np.int64))

    def _codes(self, name: str, shape: tuple[int, int, int]) -> Keys:
        context, kv_heads, head_dim = shape
        bits = self.bits
        places = self.source.permutation("places", head_dim)[: bits + 1]
        index = np.arange(context, dtype=np.int64)
        gray = index ^ (index >> 1)
        codes = gray[:, None] ^ self.source.integers("mask", (kv_heads,), 0, 2**bits - 1)
        k: Floats = 1.0 - 2 * self.source.integers(f"{name} k", shape, 0, 1).astype(np.float64)
        k[..., places[:bits]] = 1.0 - 2 * ((codes[..., None] >> np.arange(bits)) & 1)
        # A query puts minus its largest score here.
        k[..., places[bits]] = 1.0
        v = self.source.integers(f"{name} v", shape, -self.limit, self.limit).astype(np.float64)
        return Keys(k=k, v=v, codes=codes, places=places)

    def queries(self, name: str, count: int, keys: Keys, visible: Mask) -> Floats:
        """``[count, heads, head_dim]``; ``visible: [count, context]``."""
        shape = (count, self.heads, self.head_dim)
        if self.kind == EXACT:
            return self._choices(name, shape, keys, visible)
        q = self.source.normal(f"{name} q", shape)
        factor = {"peaked": 4.0, "flat": 2.0**-6}.get(self.kind, 1.0)
        return self._rounded(q * factor)

    def _choices(self, name: str, shape: tuple[int, int, int], keys: Keys, visible: Mask) -> Floats:
        count, heads, _ = shape
        q = np.zeros(shape)
        context = visible.shape[1]
        if not count or not context:
            return q
        bits = self.bits
        codes = keys.codes[:, np.arange(heads) // (heads // self.kv_heads)].T
        target, ignored = self._targets(name, (count, heads), visible, codes, bits)
        wanted = np.take_along_axis(np.broadcast_to(codes, (count, heads, context)), target[..., None], -1)
        same = ((codes[None] ^ wanted) & ~ignored[..., None]) == 0
        seen = (same & visible[:, None, :]).sum(-1)
        # The mean of three or five rows is no short number: then the query asks for its key alone.
        ignored = np.where((seen & (seen - 1) == 0) & (seen <= 4), ignored, 0)
        used = 1 - ((ignored[..., None] >> np.arange(bits)) & 1)
        signs = 1 - 2 * ((wanted >> np.arange(bits)) & 1)
        strength = GAP / 2 / self.scale
        q[..., keys.places[:bits]] = strength * used * signs
        q[..., keys.places[bits]] = -strength * used.sum(-1)
        return q

    def _targets(self, name: str, shape: tuple[int, int], visible: Mask, codes: Ints, bits: int) -> tuple[Ints, Ints]:
        """A visible key for each query and head, and the places of the code that it does not ask for.

        The last visible key and the one behind it, the first visible one and the one before, or any key and any
        places.
        """
        first = np.argmax(visible, axis=1)[:, None]
        last = visible.shape[1] - 1 - np.argmax(visible[:, ::-1], axis=1)[:, None]
        chosen = first + self.source.integers(f"{name} key", shape, 0, 1 << 20) % (last - first + 1)
        mode = (np.arange(shape[0] * shape[1]).reshape(shape) + self.source.integers(f"{name} mode", (), 0, 2)) % 3
        target = np.where(mode == 0, last, np.where(mode == 1, first, chosen))
        beyond = np.clip(np.where(mode == 0, target + 1, target - 1), 0, visible.shape[1] - 1)
        head = np.arange(shape[1])[None, :]
        neighbours = codes[head, target] ^ codes[head, beyond]
        places = self.source.integers(f"{name} places", (*shape, 2), 0, max(bits - 1, 0))
        anywhere = ((1 << places[..., 0]) | (1 << places[..., 1])) & (2**bits - 1)
        return target, np.where(mode <= 1, neighbours, anywhere)

    def _rounded(self, values: Floats) -> Floats:
        return format_of(self.dtype).round(values)


def code_bits(context: int) -> int:
    """Places of a code that tells ``context`` keys apart."""
    return max(context - 1, 1).bit_length()


def with_prefix(own: Keys, common: Keys, length: int) -> Keys:
    """A copy of ``own`` whose first ``length`` keys and values are those of ``common``."""
    k, v = own.k.copy(), own.v.copy()
    k[:length], v[:length] = common.k[:length], common.v[:length]
    return Keys(k=k, v=v, codes=own.codes, places=own.places)
