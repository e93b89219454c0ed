"""Cases of operators and stations on weights that are cut over ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import AdapterRows, Collective, DeviceState
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.multi.problem import RankedProblem, Shares, cut, nbytes, place_value, radix, summed
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, cast, coarser, finish
from polyaccel_conformance.oracle.lora import Adapter, Delta, Module, Triples, sgmv, shrink
from polyaccel_conformance.oracle.norm import rms_norm
from polyaccel_conformance.oracle.primitives import add
from polyaccel_conformance.oracle.stations import joined
from polyaccel_conformance.problem import Exactly, Outputs, Prepared
from polyaccel_conformance.problems.collectives import DIGITS
from polyaccel_conformance.problems.rows import coarsest
from polyaccel_conformance.problems.shares import (
    EMPTY,
    FILLED,
    RANKS,
    Range,
    Share,
    WholeWeight,
    cut_adapter,
    largest_rank,
    place_adapters,
)
from polyaccel_conformance.problems.steps import adapter_rows, row_step
from polyaccel_conformance.problems.weights import split_rows, tensor_of

Floats = npt.NDArray[np.float64]

OPERANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "x": ("x", "row_padded"),
        "x.transposed": ("x", "transposed"),
        "weight": ("weight", "transposed"),
        "bias": ("bias", "stepped"),
        "residual": ("residual", "row_padded"),
        "residual.transposed": ("residual", "transposed"),
    }
)
"""Operands that are not contiguous, by name of the axis value: argument and layout. A weight and a bias are written
from such tensors."""


class ShardedProblem(RankedProblem):
    """``x: [tokens, k]``, a weight of ``n`` rows, and adapters on it; :meth:`share` says who holds what.

    ``digits``: each rank's columns of x hold its own digit; rows of the weight and of A pick one column of each rank,
    rows of B one rank row, so that every result is a sum of few digits and exact in any order.
    """

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        self.exact = case.data == DIGITS
        self.tokens, self.k, self.n = case.dim("tokens"), case.dim("k"), case.dim("n")
        self.slices = split_rows(self.n, str(case.structure.get("slices", "one")))
        self._small = self._largest()
        self.x = self._draw_x()
        self.weight = WholeWeight(matrix=self._draw_matrix(), bias=self._draw_bias(), slices=self.slices)
        self.ranks = RANKS[str(case.structure["ranks"])] if case.structure["adapters"] != "none" else ()
        self.rank_rows = sum(self.ranks) + 2 if self.ranks else 0
        self.adapters = {slot: self._draw_adapter(slot, r) for slot, r in zip(FILLED, self.ranks, strict=False)}
        self.triples = self._draw_triples()
        self.operands = {"x": self.rows_of_x(rank)}

    # -- who holds what ------------------------------------------------------------------------------------------------

    @abstractmethod
    def share(self, rank: int) -> Share:
        """What a rank holds of the weight."""

    @property
    def parts(self) -> list[Range]:
        """Columns by rank; all of them together where columns are not cut."""
        return [(0, self.k)]

    def rows_of_x(self, rank: int) -> Operand:
        """x as a rank gets it."""
        begin, end = self.share(rank).columns
        return Operand(self.x.values[:, begin:end], self.case.dtype)

    def adapters_of(self, rank: int) -> dict[int, Adapter]:
        """By slot, what a rank holds of each adapter."""
        return {slot: cut_adapter(adapter, self.share(rank)) for slot, adapter in self.adapters.items()}

    def shares(self, bench: Bench) -> Shares:
        bias = 0 if self.weight.bias is None else nbytes((self.n,), self.case.dtype)
        return Shares(
            held=self.weight.place(bench, self.share(self.rank)).nbytes,
            whole=nbytes((self.n, self.k), self.case.dtype),
            replicated=bias,
        )

    # -- data ----------------------------------------------------------------------------------------------------------

    def _largest(self) -> int:
        """Of a digit of x and of the bias: base, adapter and bias together stay below the next rank's digit."""
        base = radix(self.case.dtype, len(self.parts))
        return max((base - 1) // 3, 1)

    def _draw_x(self) -> Operand:
        if not self.exact:
            values = self.source.normal("x", (self.tokens, self.k))
            if self.case.data == "outliers" and self.k:
                values[:, self.source.choose("hot", self.k, max(self.k // 64, 1))] *= 16
            return Operand.rounded(values, self.case.dtype)
        code = self.source.integers("x", (self.tokens, self.k), 1, self._small)
        code *= 1 - 2 * self.source.integers("x sign", code.shape, 0, 1)
        for number, (begin, end) in enumerate(self.parts):
            code[:, begin:end] *= place_value(self.case.dtype, len(self.parts), number)
        return Operand.rounded(code, self.case.dtype)

    def _selection(self, name: str, rows: int, signed: bool = True) -> Floats:
        """``[rows, k]``: one entry of +-1 among the columns of each rank."""
        matrix = np.zeros((rows, self.k))
        for number, (begin, end) in enumerate(self.parts):
            if end > begin:
                column = self.source.integers(f"{name} {number}", (rows,), begin, end - 1)
                sign = 1 - 2 * self.source.integers(f"{name} sign {number}", (rows,), 0, int(signed))
                matrix[np.arange(rows), column] = sign
        return matrix

    def _draw_matrix(self) -> Operand:
        if self.exact:
            return Operand.rounded(self._selection("w", self.n), self.case.dtype)
        values = self.source.normal("w", (self.n, self.k)) / np.sqrt(max(self.k, 1))
        return Operand.rounded(values, self.case.dtype)

    def _draw_bias(self) -> Operand | None:
        if not self.case.structure.get("bias"):
            return None
        if self.exact:
            values = self.source.integers("bias", (self.n,), 1, self._small).astype(np.float64)
        else:
            values = self.source.normal("bias", (self.n,))
        return Operand.rounded(values, self.case.dtype)

    def _draw_adapter(self, slot: int, rank: int) -> Adapter:
        """On every slice; the last one has a rank of its own where there are several."""
        found = []
        for index, n in enumerate(self.slices):
            own = max(rank - 1, 1) if index and index == len(self.slices) - 1 else rank
            name = f"{slot} {index}"
            if self.exact:
                a, b = self._selection(f"a {name}", own), np.zeros((n, own))
                column = self.source.integers(f"b {name}", (n,), 0, own - 1)
                b[np.arange(n), column] = 1 - 2 * self.source.integers(f"b sign {name}", (n,), 0, 1)
            else:
                a = self.source.normal(f"a {name}", (own, self.k)) / np.sqrt(max(self.k, 1))
                b = self.source.normal(f"b {name}", (n, own)) / np.sqrt(own)
            rounded = format_of(self.case.dtype).round
            found.append(Module(a=rounded(a), b=rounded(b)))
        return tuple(found)

    def _draw_triples(self) -> AdapterRows:
        pattern = str(self.case.structure["adapters"])
        mix = "one" if self.exact else str(self.case.structure.get("mix", "any"))
        return adapter_rows(self.source, self.tokens, FILLED, pattern, mix, empty_slot=EMPTY)

    # -- the call ------------------------------------------------------------------------------------------------------

    def place(self, bench: Bench) -> Prepared:
        case, share = self.case, self.share(self.rank)
        layouts = {name: case.layout(name) for name in ("weight", "bias")}
        weight = self.weight.place(bench, share, self.rank_rows, layouts)
        state = DeviceState()
        if self.rank_rows:
            adapters = self.adapters_of(self.rank)
            state = DeviceState(
                adapters=place_adapters(bench, weight, adapters, case.dtype, self.ranks, self.rank_rows)
            )
        decode = bool(case.structure.get("decode"))
        inputs = row_step(self.source, self.tokens, decode=decode, adapters=self.triples)
        return Prepared(
            arguments={
                "weight": weight,
                "step": bench.begin_step(inputs, state),
                "comm": bench.comm,
                **self.attributes(),
            },
            collect=self.collect,
            static={
                "dtype": case.dtype,
                "k": share.columns[1] - share.columns[0],
                "n": self.n,
                "hidden": self.n,
                "slices": tuple(end - begin for begin, end in share.rows),
                "bias": self.weight.bias is not None,
                "world_size": self.world_size,
                "quantised": False,
                "group_size": 0,
                "largest_rank": largest_rank(self.adapters),
            },
            ranges={"tokens": (self.tokens, max(self.tokens, 1))},
            token_class=inputs.token_class,
            adapters=inputs.has_adapters,
        )

    def attributes(self) -> Mapping[str, object]:
        """Arguments beside x, weight, step and communicator."""
        return {}

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        return {"y": tensor_of(result)}

    def digests(self) -> dict[str, str]:
        found = super().digests() | {"weight": self.weight.matrix.digest()}
        if self.weight.bias is not None:
            found["bias"] = self.weight.bias.digest()
        return found

    # -- oracle --------------------------------------------------------------------------------------------------------

    @property
    def _triples(self) -> Triples:
        rows = self.triples
        return Triples(
            rows=rows.rows.astype(np.int64), slots=rows.slots.astype(np.int64), mix=rows.weights.astype(float)
        )

    def partial(self, rank: int, addend: Floats | None = None) -> Bounded:
        """A rank's product (plus ``addend``), before any rounding."""
        share = self.share(rank)
        x = self.rows_of_x(rank).values.astype(np.float64)
        out = format_of(self.case.dtype)
        return joined(x, self.weight.matrix_of(share), self.weight.bias_of(share), out, addend=addend)

    def adapted(self, y: Bounded, rank: int) -> Bounded:
        """``y`` with what the rank's part of the adapters adds, before the rounding."""
        share = self.share(rank)
        starts = self.weight.spec(share, 0).starts
        x = self.rows_of_x(rank).values.astype(np.float64)
        kept = coarsest(self.spec, "h", self.case.dtype)
        return sgmv(y, x, self.adapters_of(rank), self._triples, starts, kept)[0]


class ColumnLinearProblem(ShardedProblem):
    """Each slice's rows are cut; x and A are whole, B is cut by its rows. Nothing is exchanged."""

    def share(self, rank: int) -> Share:
        rows = tuple(cut(n, self.world_size, rank) for n in self.slices)
        return Share(rows=rows, columns=(0, self.k), bias=self.weight_has_bias)

    @property
    def weight_has_bias(self) -> bool:
        return bool(self.case.structure.get("bias"))

    def attributes(self) -> Mapping[str, object]:
        return {"row_set": "tokens"}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        out = format_of(self.case.dtype)
        y = self.adapted(cast(self.partial(self.rank), out), self.rank)
        return {"y": finish(y, out, exact=self.exact)}


class SgmvProblem(ShardedProblem):
    """Adapters alone, in a layer whose columns (``row``) or rows (``column``) are cut."""

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        shape = (self.tokens, sum(end - begin for begin, end in self.share(rank).rows))
        values = (
            self.source.integers(f"y {rank}", shape, -self._small, self._small).astype(np.float64)
            if self.exact
            else self.source.normal(f"y {rank}", shape)
        )
        self.operands = {"y": Operand.rounded(values, case.dtype), **self.operands}

    @property
    def parts(self) -> list[Range]:
        if self.case.structure["layer"] == "column":
            return super().parts
        return [cut(self.k, self.world_size, rank) for rank in range(self.world_size)]

    def share(self, rank: int) -> Share:
        if self.case.structure["layer"] == "column":
            rows = tuple(cut(n, self.world_size, rank) for n in self.slices)
            return Share(rows=rows, columns=(0, self.k), bias=False)
        return Share(rows=tuple((0, n) for n in self.slices), columns=self.parts[rank], bias=False)

    def attributes(self) -> Mapping[str, object]:
        return {"row_set": "tokens"}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        y = Bounded.exact(self.operands["y"].values.astype(np.float64))
        return {"y": finish(self.adapted(y, self.rank), format_of(self.case.dtype), exact=self.exact)}


class RowParallelProblem(ShardedProblem):
    """Columns are cut, x and A with them; partial results are summed. Only the first rank holds the bias."""

    @property
    def parts(self) -> list[Range]:
        return [cut(self.k, self.world_size, rank) for rank in range(self.world_size)]

    def share(self, rank: int) -> Share:
        bias = bool(self.case.structure.get("bias")) and rank == 0
        return Share(rows=((0, self.n),), columns=self.parts[rank], bias=bias)

    @property
    def reduces(self) -> bool:
        return bool(self.case.attributes.get("reduce", True))

    @property
    def replicated(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"y"}) if self.reduces else frozenset()

    def attributes(self) -> Mapping[str, object]:
        return {"reduce": self.reduces}

    def collectives(self, prepared: Prepared) -> tuple[Collective, ...]:
        if not self.reduces or self.world_size == 1:
            return ()
        return (Collective("all_reduce", nbytes((self.tokens, self.n), self.case.dtype)),)

    def riding(self) -> int:
        # No step uses more rank rows than the store has; whole buckets of them may ride.
        return nbytes((self.tokens, self.rank_rows), "float32") if len(self.triples) else 0

    def total(self, addend: Floats | None = None) -> Bounded:
        """The sum over ranks, for the coarser of the two legal forms of an adapter; ``addend``: a term of the first
        rank's product."""
        out = format_of(self.case.dtype)
        if not self.reduces:
            return self.adapted(cast(self.partial(self.rank), out), self.rank)
        addends = [addend, *[None] * (self.world_size - 1)]
        partials = [cast(self.partial(rank, own), out) for rank, own in enumerate(addends)]
        if not len(self.triples):
            return summed(partials, out, last=True)
        added = summed([cast(self.adapted(y, rank), out) for rank, y in enumerate(partials)], out, last=True)
        return coarser(added, self._ridden(partials))

    def _ridden(self, partials: list[Bounded]) -> Bounded:
        """Rank rows are summed beside the output, in its format, and expanded after the sum."""
        out, kept = format_of(self.case.dtype), coarsest(self.spec, "h", self.case.dtype)
        delta = Delta(summed(partials, out))
        triples = self._triples
        for slot, members in triples.segments():
            rows = triples.rows[members]
            for module in self.adapters.get(slot, ()):
                assert module is not None
                held = []
                for rank, (begin, end) in enumerate(self.parts):
                    x = self.rows_of_x(rank).values.astype(np.float64)[rows]
                    held.append(cast(shrink(x, module.a[:, begin:end], kept), out))
                delta.add(rows, 0, summed(held, out), module.b, triples.mix[members])
        return delta.total()

    def expected(self) -> Mapping[str, Expected | Exactly]:
        return {"y": finish(self.total(), format_of(self.case.dtype), exact=self.exact)}


class RowParallelAddNormProblem(RowParallelProblem):
    """The same, then the residual and the norm; exact data determine the sum bit by bit, the norm by its bound."""

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        shape = (self.tokens, self.n)
        residual = (
            self.source.integers("residual", shape, -1, 1).astype(np.float64)
            if self.exact
            else self.source.normal("residual", shape)
        )
        weight = 1 + self.source.normal("norm_weight", (self.n,)) / 4
        self.operands = {
            **self.operands,
            "residual": Operand.rounded(residual, case.dtype),
            "norm_weight": Operand.rounded(weight, case.dtype),
        }

    @property
    def replicated(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"normed", "residual"})

    def attributes(self) -> Mapping[str, object]:
        return {"eps": self.case.attributes["eps"]}

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"expected (normed, residual), got {type(result).__name__}")
        return {"normed": tensor_of(result[0]), "residual": tensor_of(result[1])}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        out, exact = format_of(self.case.dtype), self.exact
        residual = Bounded.exact(self.operands["residual"].values.astype(np.float64))
        y = self.total()
        if exact:
            s = Bounded.exact(y.value + residual.value)
        else:
            s = coarser(add(cast(y, out), residual), self.total(residual.value))
        norm = rms_norm(
            s if exact else cast(s, out),
            self.operands["norm_weight"].values.astype(np.float64),
            _number(self.case.attributes["eps"]),
            normed=out,
            rsqrt_ulps=2,
            exact_sum=exact,
        )
        return {"normed": finish(norm, out), "residual": finish(s, out, exact=exact)}


def _number(value: Choice) -> float:
    assert isinstance(value, int | float)
    return float(value)
