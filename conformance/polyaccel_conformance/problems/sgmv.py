"""Cases of ``sgmv`` and of its halves, ``sgmv_shrink`` and ``sgmv_expand``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, cast

import numpy as np
import torch

from polyaccel.backend import OPERATORS, AdapterRows, DeviceState, StepInput, TokenClass
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS, format_of
from polyaccel_conformance.harness.layouts import accepted
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.lora import Triples, finish_touched, sgmv, sgmv_expand, sgmv_shrink
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.adapters import (
    CONSECUTIVE,
    HISTORIES,
    MOST_RANK,
    RANKS,
    AdaptedProblem,
    HostAdapters,
    arrange,
    draw_adapters,
    module_ranks,
)
from polyaccel_conformance.problems.apart import chosen, token, triples
from polyaccel_conformance.problems.contraction import (
    EXACT_KINDS,
    integer_rows,
    order_of,
    random_rows,
    spoil,
)
from polyaccel_conformance.problems.steps import MIXES, SEGMENTS, adapter_rows, row_step
from polyaccel_conformance.problems.weights import SLICES, HostWeight, split_rows, tensor_of
from polyaccel_conformance.words import Floats, Source

ROWS = (1, 0, 2, 3, 7, 16, 17, 33)
WIDTHS = (16, 1, 2, 7, 15, 17, 33, 64, 65, 129)
RANK_SIZES = (8, 1, 2, 3, 15, 16, 17, 32, 33, 64, 100, 128, MOST_RANK)
SLICE_FORMS = (*SLICES, "thin")
"""``thin``: a slice of one column beside the rest, and one of two: narrower than most ranks."""

LORA_KINDS = ("normal", *EXACT_KINDS, "positive", "wide", "outliers", "ramp", "overflow", "nonfinite")

MANY_ROWS: tuple[Mapping[str, Choice], ...] = (
    MappingProxyType({"dims.tokens": 64, "structure.segments": "runs"}),
    MappingProxyType({"dims.tokens": 129, "structure.segments": "gaps", "dtype": "bfloat16"}),
)
"""Cases beyond :data:`ROWS`, for every problem that has adapters."""

RowSetName = Literal["tokens", "logits"]

# Elements of one adapter beyond which the widths of a case are cut, so that no case takes long.
ROOM = 1 << 14


def adapter_axes() -> dict[str, Sequence[Choice]]:
    """Axes of every problem that has adapters."""
    return {
        "dims.rank": RANK_SIZES,
        "structure.ranks": RANKS[:3],
        "structure.segments": SEGMENTS,
        "structure.mix": MIXES,
        "structure.history": HISTORIES,
        "structure.others": (False, True),
        "structure.decode": (False, True),
    }


def mend_adapters(axes: dict[str, Choice], *, width: str = "dims.n") -> dict[str, Choice]:
    """Rules of every problem that has adapters: exact data need exact mix weights, infinities one sign."""
    if axes["data"] in EXACT_KINDS and axes["structure.mix"] == "any":
        axes["structure.mix"] = "power"
    if axes["data"] in ("overflow", "nonfinite"):
        axes["structure.mix"] = "one"
    if axes["data"] == "nonfinite" and axes["structure.ranks"] == "per_slice":
        # Whether NaN reaches a slice of its row that the adapter does not touch is not specified.
        axes["structure.ranks"] = "pair"
    rank, tokens = axes["dims.rank"], axes["dims.tokens"]
    assert isinstance(rank, int)
    assert isinstance(tokens, int)
    if axes["structure.segments"] in ("each", "mixes") and axes.get("structure.ranks") != "consecutive":
        # Every row is a segment, or several.
        axes["dims.tokens"] = min(tokens, 17)
    most = max(ROOM // max(rank, 1), 17)
    for name in ("dims.k", width):
        size = axes.get(name)
        if isinstance(size, int) and size > most:
            axes[name] = most
    return axes


def draw_host_adapters(
    source: Source,
    case: Case,
    slices: tuple[int, ...],
    k: int,
    *,
    data: str | None = None,
    lookup: bool = False,
    most: int | None = None,
) -> HostAdapters:
    """The adapters of a case on a weight of these slices; ``data`` and ``most`` as for :func:`draw_adapters`."""
    kind = case.data if data is None else data
    ranks = module_ranks(str(case.structure["ranks"]), case.dim("rank"), len(slices))
    adapters = draw_adapters(source, case.dtype, kind, ranks, slices, k, lookup=lookup, most=most)
    before = []
    if case.structure["history"] == "reloaded":
        larger = [[rank + 3 for rank in own] for own in ranks]
        before = draw_adapters(source, case.dtype, kind, larger, slices, k, name="before", lookup=lookup, most=most)
    return arrange(source, adapters, before=before, dirty=case.structure["history"] == "dirty", lookup=lookup)


def draw_rows(source: Source, case: Case, rows: int, adapters: HostAdapters) -> AdapterRows:
    """Triples of the case's segments and mixes over the filled slots."""
    pattern, mix = str(case.structure["segments"]), str(case.structure["mix"])
    empty = min(adapters.discarded, default=None)
    return adapter_rows(source, rows, sorted(adapters.adapters), pattern, mix, empty_slot=empty)


def triples_of(rows: AdapterRows) -> Triples:
    """As the oracle takes them."""
    return Triples(
        rows=rows.rows.astype(np.int64), slots=rows.slots.astype(np.int64), mix=rows.weights.astype(np.float64)
    )


def digests_of(rows: AdapterRows) -> dict[str, str]:
    """Hashes of the triples."""
    found = {"rows": (rows.rows, "int64"), "slots": (rows.slots, "int64"), "mix": (rows.weights, "float32")}
    return {f"triples.{name}": Operand(values, dtype).digest() for name, (values, dtype) in found.items()}


def thin_rows(n: int, pattern: str) -> tuple[int, ...]:
    """Rows of each slice, by one of :data:`SLICE_FORMS`."""
    return (1, n - 3, 2) if pattern == "thin" and n > 3 else split_rows(n, "one" if pattern == "thin" else pattern)


class LoraProblem(AdaptedProblem):
    """A weight, adapters on it, and a step whose rows use them.

    Attributes:
        weight: of which only the shape matters here.
        adapters: in their slots.
        rows: the triples of the case's row set.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        source, k = self.source, case.dim("k")
        self.exact = case.data in EXACT_KINDS
        self.row_set: RowSetName = cast(RowSetName, case.attributes["row_set"])
        self.count = case.dim("tokens")
        slices = thin_rows(case.dim("n"), str(case.structure["slices"]))
        self.weight = HostWeight(matrix=Operand(np.zeros((sum(slices), k)), case.dtype), slices=slices)
        self.adapters = draw_host_adapters(source, case, slices, k)
        self.rows = draw_rows(source, case, self.count, self.adapters)
        self.triples = triples_of(self.rows)

    @functools.cached_property
    def inputs(self) -> StepInput:
        """The step; where the case says so, the other row set has adapters too, for other rows."""
        others = None
        if self.case.structure["others"]:
            count = self.count if self.row_set == "logits" or self.case.structure["decode"] else 1
            slots = sorted(self.adapters.adapters)
            others = adapter_rows(Source(self.case.seed + 1), min(count, self.count), slots, "each")
        return row_step(
            self.source,
            self.count,
            row_set=self.row_set,
            decode=bool(self.case.structure["decode"]),
            adapters=self.rows,
            others=others,
        )

    def begin(self, bench: Bench, arguments: Mapping[str, object]) -> Prepared:
        """What all three operators share; ``arguments`` beside weight, step and row set."""
        weight, store = self.stored(bench)
        inputs, state = self.inputs, DeviceState(adapters=store)
        decode = bool(self.case.structure["decode"])
        return Prepared(
            arguments={
                "weight": weight,
                "step": bench.begin_step(inputs, state),
                "row_set": self.row_set,
                **arguments,
            },
            collect=self.collect,
            static={
                **self.weight.static(largest_rank=self.adapters.largest_rank),
                "row_set": self.row_set,
            },
            ranges={"tokens": (self.count, max(self.count, 1))},
            token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
            adapters=inputs.has_adapters,
            again=lambda: {"step": bench.begin_step(inputs, state)},
        )

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What was written in place, and what was returned: the same."""
        return {"y": tensors["y"], "returned": tensor_of(result)}

    @property
    def apart(self) -> Sequence[int]:
        return range(self.count)

    def alone(self, row: int) -> Problem:
        return self._with(token(self, row), triples(self.rows, row))

    def _with(self, other: LoraProblem, rows: AdapterRows) -> LoraProblem:
        other.count, other.rows, other.triples = 1, rows, triples_of(rows)
        return other

    def y_values(self, shape: tuple[int, int]) -> Floats:
        """What the deltas are added to."""
        source, case = self.source, self.case
        if case.data == "cancelling":
            return source.integers("y", shape, -64, 64).astype(np.float64)
        if self.exact:
            most = 100_000 if case.dtype == "float32" else 1000
            return source.integers("y", shape, -most, most).astype(np.float64)
        if case.data == "overflow":
            # Every other column is negative, as B's rows are; the deltas are a few percent.
            sign = 1.0 - 2.0 * (np.arange(shape[1]) % 2)
            size: Floats = FORMATS[case.dtype].max * (0.9 + 0.1 * source.uniform("y", shape))
            return size * sign
        return source.normal("y", shape)

    def digests(self) -> dict[str, str]:
        return super().digests() | self.adapters.digests() | digests_of(self.rows)


def row_values(source: Source, case: Case, rows: int) -> Operand:
    """x for adapters: h of exact data stays within what every permitted format holds."""
    k = case.dim("k")
    if case.data in EXACT_KINDS:
        most = None if case.data == "cancelling" else {"bfloat16": 64, "float16": 128}.get(case.dtype)
        return Operand.rounded(integer_rows(source, case.dtype, case.data, rows, k, "x", most=most), case.dtype)
    x = Operand.rounded(random_rows(source, case.data, rows, k, "x"), case.dtype)
    # A zero rank row makes NaN of an infinity that contributes nothing: only NaN is the same for all.
    return spoil(source, x, infinities=False) if case.data == "nonfinite" else x


class SgmvProblem(LoraProblem):
    """``y += mix * x A B`` for each triple."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        rows, n = self.count, case.dim("n")
        x = row_values(self.source, case, rows)
        if case.data == "overflow":
            self.adapters = _towards_overflow(self.adapters, x, case.dtype, self.weight.starts)
        y = Operand.rounded(self.y_values((rows, n)), case.dtype)
        if case.data == "overflow":
            y = Operand(np.clip(y.values, -FORMATS[case.dtype].max, FORMATS[case.dtype].max), case.dtype)
        self.operands = {"y": y, "x": x}

    def prepare(self, bench: Bench) -> Prepared:
        return self.begin(bench, {})

    def expected(self) -> Mapping[str, Expected | Exactly]:
        out = format_of(self.case.dtype)
        y, touched = sgmv(
            Bounded.exact(self.operands["y"].values),
            self.operands["x"].values.astype(np.float64),
            self.adapters.oracle(),
            self.triples,
            self.weight.starts,
            out,
            order_of(self.case.data),
        )
        expected = finish_touched(y, touched, out, exact=bool(self.exact))
        return {"y": expected, "returned": expected}


class ShrinkProblem(LoraProblem):
    """``h = x A`` for each triple. h may be of x's dtype or float32, and is compared as float32."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.operands = {"x": row_values(self.source, case, self.count)}

    def prepare(self, bench: Bench) -> Prepared:
        return self.begin(bench, {})

    @property
    def apart(self) -> Sequence[int]:
        return range(len(self.rows))

    def alone(self, row: int) -> Problem:
        """A row of h is a triple."""
        return self._with(token(self, int(self.rows.rows[row])), chosen(self.rows, np.array([row])))

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        h = tensor_of(result)
        return {"h": h.float() if h.dtype == FORMATS[self.case.dtype].torch else h}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        h = sgmv_shrink(
            self.operands["x"].values.astype(np.float64),
            self.adapters.oracle(),
            self.triples,
            len(self.weight.slices),
            self.adapters.largest_rank if len(self.rows) else 0,
            format_of(self.case.dtype),
            order_of(self.case.data),
        )
        return {"h": finish(h, FORMATS["float32"], exact=bool(self.exact))}


class ExpandProblem(LoraProblem):
    """``y += mix * h B`` for each triple; h beyond a module's rank is NaN."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        rows, n = self.count, case.dim("n")
        dtype = "float32" if case.structure["h"] == "float32" else case.dtype
        self.operands = {
            "y": Operand.rounded(self.y_values((rows, n)), case.dtype),
            "h": Operand.rounded(self._h(dtype), dtype),
        }

    def _h(self, dtype: str) -> Floats:
        source, case, slices = self.source, self.case, len(self.weight.slices)
        r = self.adapters.largest_rank + (3 if case.structure["wide_h"] else 0)
        shape = (len(self.rows), slices, r)
        if self.exact:
            h = source.integers("h", shape, -255, 255).astype(np.float64)
            if case.data == "cancelling":
                for module, where in self._modules(h):
                    half = module // 2
                    where[:, half : 2 * half] = where[:, :half]
        else:
            h = random_rows(source, case.data, shape[0] * slices, r, "h").reshape(shape)
        beyond = np.ones(shape, dtype=bool)
        for rank, where in self._modules(beyond):
            where[:, :rank] = False
        spoiled: Floats = np.where(beyond, np.nan, h)
        return spoiled

    def _modules(self, h: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Each module's rank and its part of ``h: [triples, slices, r]``, a view; ranks in triple order."""
        found = []
        for i, slot in enumerate(self.triples.slots.tolist()):
            for s, module in enumerate(self.adapters.adapters.get(slot, ())):
                if module is not None:
                    found.append((module.rank, h[i : i + 1, s]))
        return found

    def prepare(self, bench: Bench) -> Prepared:
        return self.begin(bench, {})

    def alone(self, row: int) -> Problem:
        other = super().alone(row)
        h = self.operands["h"]
        mine = Operand(h.values[self.rows.rows == row], h.dtype)
        other.operands = {**other.operands, "h": mine}
        return other

    def expected(self) -> Mapping[str, Expected | Exactly]:
        y, touched = sgmv_expand(
            Bounded.exact(self.operands["y"].values),
            self.operands["h"].values.astype(np.float64),
            self.adapters.oracle(),
            self.triples,
            self.weight.starts,
            order_of(self.case.data),
        )
        expected = finish_touched(y, touched, format_of(self.case.dtype), exact=bool(self.exact))
        return {"y": expected, "returned": expected}


def _towards_overflow(adapters: HostAdapters, x: Operand, dtype: str, starts: Sequence[int]) -> HostAdapters:
    """B scaled by a power of two, so that deltas are a few percent of the largest number, with the signs of y."""
    modules = [m for adapter in adapters.adapters.values() for m in adapter if m is not None]
    rows = x.values.astype(np.float64)
    sizes = [
        float((rows @ m.a.values.astype(np.float64).T @ m.b.values.astype(np.float64).T).max(initial=0.0))
        for m in modules
    ]
    largest = max(sizes, default=0.0)
    shift = int(np.floor(np.log2(FORMATS[dtype].max * 0.04 / largest))) if largest > 0 else 0
    return adapters.scaled(shift, starts)


def _shared_axes(operator: str) -> dict[str, Sequence[Choice]]:
    spec = OPERATORS[operator]
    layouts = {
        f"layouts.{argument.name}": accepted(argument) for argument in spec.arguments if argument.kind == "tensor"
    }
    return {
        "dtype": ("float32", "bfloat16", "float16"),
        "dims.tokens": ROWS,
        "dims.k": WIDTHS,
        "dims.n": WIDTHS,
        "attributes.row_set": ("tokens", "logits"),
        **layouts,
        "structure.slices": SLICE_FORMS,
        **adapter_axes(),
        "data": LORA_KINDS,
        "device": ("current", "other"),
        "stream": ("default", "side"),
    }


def _by_turns(large: Sequence[Mapping[str, Choice]]) -> tuple[Mapping[str, Choice], ...]:
    """Every third: each rank once, the dtypes by turns, since no dtype has a multiple of three ranges of ranks."""
    return tuple(large[::3])


class SgmvProblems(ProblemSet):
    """One to three slices, three adapters to :data:`CONSECUTIVE` of any rank, any segments."""

    operator = "sgmv"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return _shared_axes(self.operator)

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.k": (0, 150), "dims.n": (1, 150), "dims.rank": (1, MOST_RANK)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        """Every rank from 1 to 512."""
        return MANY_ROWS + tuple(
            MappingProxyType(
                {
                    "dtype": dtype,
                    "dims.tokens": CONSECUTIVE,
                    "dims.k": 7,
                    "dims.n": 9,
                    "dims.rank": rank,
                    "structure.ranks": "consecutive",
                    "structure.segments": "each",
                    "data": data,
                }
            )
            for dtype, data in (("float32", "integers"), ("bfloat16", "cancelling"), ("float16", "cancelling"))
            for rank in range(1, MOST_RANK, CONSECUTIVE)
        )

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        return mend_adapters(axes)

    def problem(self, case: Case) -> Problem:
        return SgmvProblem(case)


class ShrinkProblems(SgmvProblems):
    """As for sgmv, without y."""

    operator = "sgmv_shrink"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        kinds = tuple(kind for kind in LORA_KINDS if kind != "overflow")
        return {**_shared_axes(self.operator), "data": kinds}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return _by_turns(super().large())

    def problem(self, case: Case) -> Problem:
        return ShrinkProblem(case)


class ExpandProblems(SgmvProblems):
    """As for sgmv, with h of either dtype instead of x, as wide as the largest rank or wider."""

    operator = "sgmv_expand"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        kinds = tuple(kind for kind in LORA_KINDS if kind not in ("overflow", "nonfinite"))
        return {
            **_shared_axes(self.operator),
            "structure.h": ("float32", "x"),
            "structure.wide_h": (False, True),
            "data": kinds,
        }

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return tuple({**axes, "structure.h": "x"} for axes in _by_turns(super().large()))

    def problem(self, case: Case) -> Problem:
        return ExpandProblem(case)
