"""Adapters in float64 with their bound: ``y[row] += mix * (x[row] @ A.T) @ B.T`` for each (row, slot, mix) triple.

Definition: Hu et al., LoRA (arXiv 2106.09685), the scale folded into B; segments of rows: Punica (arXiv 2310.18547).
h may be kept in x's dtype. The mix weight may multiply h or the delta. y may be where the accumulator starts or be
added last, and a row's adapters may be summed one by one or at once: all are sums of the same terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format
from polyaccel_conformance.oracle.bounded import Bounded, Expected, Noise, cast, deviations, finish
from polyaccel_conformance.oracle.primitives import ACCUMULATOR, Order, accumulated, carried, matmul

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Module:
    """An adapter's matrices on one slice: ``a: [rank, k]``, ``b: [n of the slice, rank]``, as stored."""

    a: Floats
    b: Floats

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


Adapter = tuple[Module | None, ...]
"""An adapter at one site, by slice; None where it does not touch the slice."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Triples:
    """``rows, slots: [triples]`` int64, ``mix: [triples]`` float64."""

    rows: Ints
    slots: Ints
    mix: Floats

    def segments(self) -> Iterable[tuple[int, Ints]]:
        """Each slot with the triples that name it."""
        for slot in np.unique(self.slots):
            yield int(slot), np.flatnonzero(self.slots == slot)


def shrink(x: Floats, a: Floats, kept: Format, order: Order = "random") -> Bounded:
    """``x @ a.T`` for ``x: [rows, k]``, ``a: [rank, k]``, kept in ``kept`` or float32."""
    h = matmul(Bounded.exact(x), Bounded.exact(a.T), order)
    return h if kept.name == "float32" or order == "exact" else cast(h, kept, "h")


def lookup(a: Floats, columns: Ints, inside: npt.NDArray[np.bool_]) -> Bounded:
    """What an embedding's adapter has for h: ``a[:, columns].T``, zeros where not inside. Stored values, so exact."""
    if not a.shape[1]:
        return Bounded.exact(np.zeros((len(columns), a.shape[0])))
    return Bounded.exact(np.where(inside[:, None], a[:, np.where(inside, columns, 0)].T, 0.0))


class Delta:
    """Collects what adapters add to ``y: [rows, n]`` and finishes the sum.

    Args:
        y: what they add to; its error is carried.
        order: of the sums over the rank.
    """

    def __init__(self, y: Bounded, order: Order = "random") -> None:
        zeros = np.zeros_like(y.value)
        self._y, self._order = y, order
        self._value, self._squares, self._magnitudes = zeros.copy(), zeros.copy(), zeros.copy()
        self._terms, self._hard, self._variance = zeros.copy(), zeros.copy(), zeros.copy()
        self.touched = np.zeros(y.shape, dtype=bool)

    def add(self, rows: Ints, begin: int, h: Bounded, b: Floats, mix: Floats) -> None:
        """``mix * h @ b.T`` to columns ``begin:`` of ``rows``, each of which appears once.

        ``h: [rows, rank]``, ``b: [n, rank]``, ``mix: [rows]``.
        """
        where = _block(rows, begin, begin + b.shape[0])
        weights = mix[:, None]
        factor = b.T
        self._value[where] += weights * (h.value @ factor)
        self.touched[where] = True
        if self._order == "exact":
            return
        self._squares[where] += weights**2 * (h.value**2 @ factor**2)
        magnitudes = np.abs(weights) * (np.abs(h.value) @ np.abs(factor))
        self._magnitudes[where] += magnitudes
        self._terms[where] += b.shape[1]
        if np.any(h.bound):
            extra, scale = carried(h, factor, self._order)
            if scale is not None:
                # Roundings of h are independent of each other, and of those of the row's other adapters.
                random = np.minimum(extra, deviations(self._value.size) * scale)
                self._variance[where] += (weights * scale) ** 2
                extra = extra - random
            self._hard[where] += np.abs(weights) * extra
        # A product with a power of two is exact.
        inexact = np.frexp(weights)[0] % 0.5 != 0
        if inexact.any():
            self._hard[where] += np.where(inexact, ACCUMULATOR * magnitudes, 0.0)

    def total(self) -> Bounded:
        """y with all deltas, before the output rounding; y itself where nothing was added."""
        y = self._y
        value = y.value + self._value
        if self._order == "exact":
            return Bounded.exact(value)
        result = Bounded(value, y.bound, y.terms, y.noise)
        result = result.plus("error of h", self._hard)
        if self._variance.any():
            scale = np.sqrt(self._variance)
            result = result.plus("error of h, random", deviations(value.size) * scale, scale)
        size = np.abs(y.value)
        summed = accumulated(
            Bounded(value, np.zeros_like(value)),
            self._squares + size**2,
            self._magnitudes + size,
            self._terms + 1,
            self._order,
        )
        for name, term in summed.terms:
            result = result.plus(name, np.where(self.touched, term, 0.0))
        if summed.noise is not None:
            scale = np.where(self.touched, summed.noise.scale, 0.0)
            bound = np.where(self.touched, summed.noise.bound, 0.0)
            known = result.noise
            joined = Noise(bound, scale) if known is None else Noise(known.bound + bound, np.hypot(known.scale, scale))
            result = Bounded(result.value, result.bound, result.terms, joined)
        return result


Index = slice | npt.NDArray[np.int64]


def _block(rows: Ints, begin: int, end: int) -> tuple[Index, Index]:
    """Index of the columns ``begin:end`` of some rows: a view where they follow each other."""
    if len(rows) and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(begin, end)
    return rows[:, None], np.arange(begin, end)[None, :]


def sgmv(
    y: Bounded,
    x: Floats,
    adapters: Mapping[int, Adapter],
    triples: Triples,
    starts: tuple[int, ...],
    kept: Format,
    order: Order = "random",
) -> tuple[Bounded, npt.NDArray[np.bool_]]:
    """``y: [rows, n]`` with every triple's delta, before the output rounding; and which elements have one.

    Args:
        x: ``[rows, k]``.
        adapters: by slot, as the weight's slices; slots that hold nothing are absent.
        starts: first column of each slice.
        kept: format in which h may be kept, beside float32.
    """
    delta = Delta(y, order)
    with np.errstate(invalid="ignore", over="ignore"):
        for slot, members in triples.segments():
            rows, mix = triples.rows[members], triples.mix[members]
            for begin, module in zip(starts, adapters.get(slot, ()), strict=False):
                if module is not None:
                    delta.add(rows, begin, shrink(x[rows], module.a, kept, order), module.b, mix)
        return delta.total(), delta.touched


def sgmv_shrink(
    x: Floats,
    adapters: Mapping[int, Adapter],
    triples: Triples,
    slices: int,
    largest: int,
    kept: Format,
    order: Order = "random",
) -> Bounded:
    """``h: [triples, slices, largest]``, zero beyond each module's rank; kept in ``kept`` or float32."""
    shape = (len(triples.rows), slices, largest)
    value, bound = np.zeros(shape), np.zeros(shape)
    for slot, members in triples.segments():
        for i, module in enumerate(adapters.get(slot, ())):
            if module is not None:
                h = shrink(x[triples.rows[members]], module.a, kept, order)
                value[members, i, : module.rank], bound[members, i, : module.rank] = h.value, h.bound
    return Bounded(value, bound, (("accumulation and rounding of h", bound),))


def sgmv_expand(
    y: Bounded,
    h: Floats,
    adapters: Mapping[int, Adapter],
    triples: Triples,
    starts: tuple[int, ...],
    order: Order = "random",
) -> tuple[Bounded, npt.NDArray[np.bool_]]:
    """``y: [rows, n]`` plus ``mix_i * h[i, slice, :rank] @ B.T`` for each triple i; and which elements have a delta.

    ``h: [triples, slices, r]`` as stored; what lies beyond a module's rank is not read.
    """
    delta = Delta(y, order)
    with np.errstate(invalid="ignore", over="ignore"):
        for slot, members in triples.segments():
            rows, mix = triples.rows[members], triples.mix[members]
            for i, (begin, module) in enumerate(zip(starts, adapters.get(slot, ()), strict=False)):
                if module is not None:
                    delta.add(rows, begin, Bounded.exact(h[members, i, : module.rank]), module.b, mix)
        return delta.total(), delta.touched


def embedding(
    table: Floats,
    ids: Ints,
    vocabulary_start: int,
    adapters: Mapping[int, Adapter],
    triples: Triples,
    order: Order = "random",
) -> tuple[Bounded, npt.NDArray[np.bool_]]:
    """Rows ``ids - vocabulary_start`` of ``table: [rows, hidden]``, zeros outside, plus ``mix * B @ A[:, id]``.

    An embedding's module has ``a: [rank, rows]`` and ``b: [hidden, rank]``.
    """
    local = ids - vocabulary_start
    inside = (local >= 0) & (local < table.shape[0])
    x = np.zeros((len(ids), table.shape[1]))
    x[inside] = table[local[inside]]
    delta = Delta(Bounded.exact(x), order)
    for slot, members in triples.segments():
        rows = triples.rows[members]
        module = adapters.get(slot, (None,))[0]
        if module is not None:
            h = lookup(module.a, local[rows], inside[rows])
            delta.add(rows, 0, h, module.b, triples.mix[members])
    return delta.total(), delta.touched


def finish_touched(total: Bounded, touched: npt.NDArray[np.bool_], out: Format, *, exact: bool = False) -> Expected:
    """As :func:`finish`; elements that no adapter touches are stored values and stay what they are."""
    expected = finish(total, out, exact=exact)
    if exact or touched.all():
        return expected
    tolerance = np.where(touched, expected.tolerance, 0.0)
    terms = tuple((name, np.where(touched, term, 0.0)) for name, term in expected.terms)
    return Expected(expected.value, tolerance, out, False, terms)
