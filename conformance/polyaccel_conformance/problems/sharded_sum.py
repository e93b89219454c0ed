"""Cases whose partial results the caller sums over ranks: embeddings cut by vocabulary, experts cut either way.

The operator itself exchanges nothing. The sum is made here, through the communicator under test, and both it and the
partial result are outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polyaccel.backend import AdapterRows, DeviceState
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.multi.problem import RankedProblem, Shares, cut, nbytes, radix, summed
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, cast, finish
from polyaccel_conformance.oracle.lora import Adapter, Module, Triples, embedding, finish_touched
from polyaccel_conformance.oracle.moe import experts
from polyaccel_conformance.problem import Exactly, Outputs, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.collectives import DIGITS, SKEWS
from polyaccel_conformance.problems.expert_weights import ExpertWeight
from polyaccel_conformance.problems.sharded_sets import EVEN, PATTERNS, TOKENS
from polyaccel_conformance.problems.shares import (
    EMPTY,
    FILLED,
    RANKS,
    Share,
    WholeWeight,
    cut_adapter,
    largest_rank,
    place_adapters,
)
from polyaccel_conformance.problems.steps import adapter_rows, row_step
from polyaccel_conformance.problems.weights import tensor_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

GATE_UP, DOWN = "experts.gate_up", "experts.down"
STEEP = 128.0
"""From here on silu is its argument."""


class SummedProblem(RankedProblem):
    """Outputs ``partial`` and ``y``, the sum of all ranks' partial results."""

    replicated = frozenset({"y"})

    @abstractmethod
    def partial(self, rank: int) -> Bounded:
        """A rank's result before its rounding."""

    def summing(self, bench: Bench, result: object) -> Outputs:
        """The rank's result and the sum over ranks."""
        partial = tensor_of(result)
        # The sum is in place, and must not reach the partial result before that is complete.
        bench.synchronize()
        total = bench.upload(partial.detach().to("cpu", copy=True))
        return {"partial": partial, "y": bench.comm.all_reduce(total)}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        out, exact = format_of(self.case.dtype), self.exact
        parts = [cast(self.partial(rank), out) for rank in range(self.world_size)]
        return {
            "partial": finish(self.partial(self.rank), out, exact=exact),
            "y": finish(summed(parts, out, last=True), out, exact=exact),
        }


class EmbeddingProblem(SummedProblem):
    """A table of ``n`` rows of ``hidden``, cut by rows; ids outside of a rank's rows give zeros there."""

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        self.exact = case.data == DIGITS
        tokens, self.rows, self.hidden = case.dim("tokens"), case.dim("n"), case.dim("hidden")
        self.ids = self.source.integers("ids", (tokens,), 0, self.rows - 1)
        # The last row, and the first of every rank.
        edges = [self.rows - 1, *(self.share(r).rows[0][0] for r in range(case.ranks))]
        chosen = [edge for edge in edges if edge < self.rows][:tokens]
        self.ids[: len(chosen)] = chosen
        base = radix(case.dtype, 1)
        shape = (self.rows, self.hidden)
        table = self.source.integers("w", shape, -base, base) if self.exact else self.source.normal("w", shape)
        self.table = WholeWeight(matrix=Operand.rounded(table, case.dtype), bias=None, slices=(self.rows,), lookup=True)
        self.ranks = RANKS[str(case.structure["ranks"])] if case.structure["adapters"] != "none" else ()
        self.rank_rows = sum(self.ranks) + 2 if self.ranks else 0
        self.adapters = {slot: self._draw_adapter(slot, r) for slot, r in zip(FILLED, self.ranks, strict=False)}
        self.triples = self._draw_triples(tokens)
        self.operands = {}

    def share(self, rank: int) -> Share:
        """Equal numbers of rows, as gathered logits need them; the last ranks may have fewer, or none."""
        each = -(-self.rows // self.world_size)
        begin = min(rank * each, self.rows)
        return Share(rows=((begin, min(begin + each, self.rows)),), columns=(0, self.hidden), bias=False)

    def start(self, rank: int) -> int:
        """First id of a rank."""
        return rank * -(-self.rows // self.world_size)

    def shares(self, bench: Bench) -> Shares:
        return Shares(
            held=self.table.place(bench, self.share(self.rank)).nbytes,
            whole=nbytes((self.rows, self.hidden), self.case.dtype),
        )

    def place(self, bench: Bench) -> Prepared:
        case, share = self.case, self.share(self.rank)
        weight = self.table.place(bench, share, self.rank_rows)
        state = DeviceState()
        if self.rank_rows:
            held = {s: cut_adapter(adapter, share, lookup=True) for s, adapter in self.adapters.items()}
            state = DeviceState(adapters=place_adapters(bench, weight, held, case.dtype, self.ranks, self.rank_rows))
        inputs = row_step(self.source, case.dim("tokens"), adapters=self.triples, token_ids=self.ids)
        return Prepared(
            arguments={
                "weight": weight,
                "step": bench.begin_step(inputs, state),
                "vocabulary_start": self.start(self.rank),
            },
            collect=lambda result, _: self.summing(bench, result),
            static={
                "dtype": case.dtype,
                "k": self.hidden,
                "hidden": self.hidden,
                "slices": (share.rows[0][1] - share.rows[0][0],),
                "bias": False,
                "world_size": self.world_size,
                "quantised": False,
                "largest_rank": largest_rank(self.adapters),
            },
            ranges={"tokens": (case.dim("tokens"), max(case.dim("tokens"), 1))},
            token_class=inputs.token_class,
            adapters=inputs.has_adapters,
        )

    def partial(self, rank: int) -> Bounded:
        return self._looked_up(rank)[0]

    def expected(self) -> Mapping[str, Expected | Exactly]:
        """Of every token's row one rank has all and the others zero, so that the sum rounds nothing."""
        out, exact = format_of(self.case.dtype), self.exact
        found = [self._looked_up(rank) for rank in range(self.world_size)]
        value = np.sum([total.value for total, _ in found], axis=0)
        owner = [self._owned(rank) for rank in range(self.world_size)]
        bound = np.sum([np.where(own, t.bound, 0.0) for own, (t, _) in zip(owner, found, strict=True)], axis=0)
        touched = np.any([own & hit for own, (_, hit) in zip(owner, found, strict=True)], axis=0)
        partial, hit = found[self.rank]
        return {
            "partial": finish_touched(partial, hit, out, exact=exact),
            "y": finish_touched(Bounded(value, bound), touched, out, exact=exact),
        }

    def _owned(self, rank: int) -> npt.NDArray[np.bool_]:
        (rows,) = self.share(rank).rows
        return ((self.ids >= rows[0]) & (self.ids < rows[1]))[:, None]

    def _looked_up(self, rank: int) -> tuple[Bounded, npt.NDArray[np.bool_]]:
        share, rows = self.share(rank), self.triples
        held = {slot: cut_adapter(adapter, share, lookup=True) for slot, adapter in self.adapters.items()}
        triples = Triples(
            rows=rows.rows.astype(np.int64), slots=rows.slots.astype(np.int64), mix=rows.weights.astype(float)
        )
        return embedding(self.table.matrix_of(share), self.ids, self.start(rank), held, triples)

    def _draw_adapter(self, slot: int, rank: int) -> Adapter:
        rounded = format_of(self.case.dtype).round
        if self.exact:
            a = self.source.integers(f"a {slot}", (rank, self.rows), -3, 3).astype(np.float64)
            b = np.zeros((self.hidden, rank))
            b[np.arange(self.hidden), self.source.integers(f"b {slot}", (self.hidden,), 0, rank - 1)] = 1.0
        else:
            a = self.source.normal(f"a {slot}", (rank, self.rows))
            b = self.source.normal(f"b {slot}", (self.hidden, rank)) / np.sqrt(rank)
        return (Module(a=rounded(a), b=rounded(b)),)

    def _draw_triples(self, tokens: int) -> AdapterRows:
        mix = "one" if self.exact else str(self.case.structure.get("mix", "any"))
        return adapter_rows(self.source, tokens, FILLED, str(self.case.structure["adapters"]), mix, empty_slot=EMPTY)

    def digests(self) -> dict[str, str]:
        return {"weight": self.table.matrix.digest()}


class MoeExpertsProblem(SummedProblem):
    """Experts cut by ``tensor`` (every expert's intermediate dimension) or by ``expert`` (whole experts, the others are
    holes of the map). A bias of ``down`` is held once.

    ``digits``: hidden columns are switches and values; an expert's gate is a steep switch of its own, what passes is
    a power of two that names the part of the intermediate dimension, and routing weights are powers of two.
    """

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        self.exact = case.data == DIGITS
        self.tokens, self.hidden = case.dim("tokens"), case.dim("hidden")
        self.inner, self.total, self.top_k = case.dim("intermediate"), case.dim("experts"), case.dim("top_k")
        self.by_expert = case.structure["cut"] == "expert"
        order = np.argsort(self.source.uniform("ids", (self.tokens, self.total)), axis=1, kind="stable")
        self.ids: Ints = order[:, : self.top_k]
        self.operands = {
            "x": self._draw_x(),
            "ids": Operand(self.ids, "int32"),
            "weights": self._draw_weights(),
        }
        if self.by_expert:
            self.operands["expert_map"] = Operand(self.map_of(rank), "int32")

    # -- who holds what ------------------------------------------------------------------------------------------------

    def held(self, rank: int) -> Ints:
        """Numbers of the experts that a rank holds, one at least."""
        if not self.by_expert:
            return np.arange(self.total)
        begin, end = cut(self.total, self.world_size, rank)
        return np.arange(begin, end)

    def map_of(self, rank: int) -> Ints:
        """Global number to local, -1 elsewhere."""
        found = np.full(self.total, -1, dtype=np.int64)
        held = self.held(rank)
        found[held] = np.arange(len(held))
        return found

    def weights_of(self, rank: int) -> tuple[ExpertWeight, ExpertWeight]:
        """gate_up and down as a rank holds them."""
        begin, end = (0, self.inner) if self.by_expert else cut(self.inner, self.world_size, rank)
        held = self.held(rank)
        gate, up, down = self._matrices()
        gate_up = np.concatenate([gate[held, begin:end], up[held, begin:end]], axis=1)
        bias = None
        if self.case.structure["bias"] and (self.by_expert or rank == 0):
            bias = Operand.rounded(self._bias()[held], self.case.dtype)
        return (
            ExpertWeight(
                site=GATE_UP,
                matrix=Operand.rounded(gate_up, self.case.dtype),
                bias=None,
                slices=(end - begin, end - begin),
                codes=None,
                rank_rows=0,
            ),
            ExpertWeight(
                site=DOWN,
                matrix=Operand.rounded(down[held][:, :, begin:end], self.case.dtype),
                bias=bias,
                slices=(self.hidden,),
                codes=None,
                rank_rows=0,
            ),
        )

    def shares(self, bench: Bench) -> Shares:
        """A bias is held by the first rank alone, or with its expert."""
        size = 3 * self.total * self.inner * self.hidden
        bias = self.total * self.hidden if self.case.structure["bias"] else 0
        return Shares(
            held=sum(weight.place(bench).nbytes for weight in self.weights_of(self.rank)),
            whole=nbytes((size,), self.case.dtype),
            replicated=nbytes((bias,), self.case.dtype),
        )

    # -- data ----------------------------------------------------------------------------------------------------------

    def _draw_x(self) -> Operand:
        if not self.exact:
            return Operand.rounded(self.source.normal("x", (self.tokens, self.hidden)), self.case.dtype)
        x = np.ones((self.tokens, self.hidden))
        x[:, 0] = STEEP
        return Operand.rounded(x, self.case.dtype)

    def _draw_weights(self) -> Operand:
        shape = self.ids.shape
        if self.exact:
            # 1, 2, 4, ...: which of its experts a token has lost shows in the sum.
            return Operand(np.broadcast_to(2.0 ** np.arange(self.top_k), shape).copy(), "float32")
        return Operand.rounded(self.source.uniform("weights", shape), "float32")

    def _matrices(self) -> tuple[Floats, Floats, Floats]:
        """``gate, up: [experts, inner, hidden]``, ``down: [experts, hidden, inner]``."""
        shape, source = (self.total, self.inner, self.hidden), self.source
        if not self.exact:
            width, depth = np.sqrt(self.hidden), np.sqrt(self.inner)
            down = source.normal("down", (self.total, self.hidden, self.inner)) / depth
            return source.normal("gate", shape) / width, source.normal("up", shape) / width, down
        gate, up = np.zeros(shape), np.zeros(shape)
        # silu(128) * 2^-7 = 1 where the gate is open; every other gate is shut.
        gate[:, :, 0] = 1.0
        gate[:, 1::2, 0] = -1.0
        up[:, :, 0] = 2.0**-14
        down = source.integers("down", (self.total, self.hidden, self.inner), -1, 1).astype(np.float64)
        # Few terms, so that every sum is exact in 8 bits.
        keep = np.zeros(self.inner, dtype=bool)
        for rank in range(self.world_size):
            begin, end = cut(self.inner, self.world_size, rank)
            keep[begin + (begin % 2) : end][:1] = True
        return gate, up, np.where(keep, down, 0.0)

    def _bias(self) -> Floats:
        shape = (self.total, self.hidden)
        if self.exact:
            return self.source.integers("bias", shape, 1, 2).astype(np.float64)
        return self.source.normal("bias", shape)

    # -- the call ------------------------------------------------------------------------------------------------------

    def place(self, bench: Bench) -> Prepared:
        gate_up, down = (weight.place(bench) for weight in self.weights_of(self.rank))
        inputs = row_step(self.source, self.tokens)
        return Prepared(
            arguments={
                "gate_up": gate_up,
                "down": down,
                "step": bench.begin_step(inputs, DeviceState()),
                "act": "silu",
            },
            collect=lambda result, _: self.summing(bench, result),
            static={
                "dtype": self.case.dtype,
                "hidden": self.hidden,
                "k": self.hidden,
                "slices": tuple(part.n for part in gate_up.spec.slices),
                "intermediate": down.spec.k,
                "act": "silu",
                "quantised": False,
                "group_size": 0,
                "expert_map": self.by_expert,
                "experts": self.total,
                "top_k": self.top_k,
                "world_size": self.world_size,
                "largest_rank": 0,
            },
            ranges={"tokens": (self.tokens, max(self.tokens, 1))},
        )

    def partial(self, rank: int) -> Bounded:
        gate_up, down = self.weights_of(rank)
        local = self.map_of(rank)[self.ids] if self.by_expert else self.ids
        return experts(
            self.operands["x"].values.astype(np.float64),
            gate_up.projection(),
            down.projection(),
            local,
            self.operands["weights"].values.astype(np.float64),
            ((), ()),
            format_of(self.case.dtype),
        )

    def digests(self) -> dict[str, str]:
        gate_up, down = self.weights_of(self.rank)
        return super().digests() | gate_up.digests() | down.digests()


class EmbeddingProblems(ProblemSet):
    operator = "embedding"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.n": (9, 1, 2, 5, 16, 50, 129),
            "dims.hidden": (8, 1, 5, 16, 33, 64),
            "structure.adapters": PATTERNS,
            "structure.ranks": tuple(RANKS),
            "structure.mix": ("one", "power", "any"),
            "structure.even": (False, True),
            "data": (DIGITS, "normal"),
            "skew": SKEWS,
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.n": (1, 140), "dims.hidden": (1, 80)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] == DIGITS and axes["structure.adapters"] == "mixes":
            axes["structure.adapters"] = "each"
        if axes["structure.even"]:
            axes["dims.n"], axes["dims.hidden"] = EVEN * _integer(axes.get("ranks", 1)), EVEN
        return axes

    def problem(self, case: Case) -> Problem:
        return EmbeddingProblem(case)


class MoeExpertsProblems(ProblemSet):
    operator = "moe_experts"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.hidden": (8, 1, 5, 16, 33),
            "dims.intermediate": (8, 16, 31),
            "dims.experts": (4, 5, 8),
            "dims.top_k": (1, 2, 3),
            "structure.cut": ("tensor", "expert"),
            "structure.even": (False, True),
            "structure.bias": (False, True),
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "data": (DIGITS, "normal"),
            "skew": SKEWS,
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.hidden": (1, 64), "dims.intermediate": (8, 64)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """Every rank holds an expert, and a part of every expert's intermediate dimension; where it is even, sizes that
        no backend needs to pad."""
        world = _integer(axes.get("ranks", 1))
        if axes["structure.even"]:
            axes |= {"dims.hidden": EVEN, "dims.intermediate": EVEN, "dims.experts": 2}
            cut_axis = "dims.experts" if axes["structure.cut"] == "expert" else "dims.intermediate"
            axes[cut_axis] = _integer(axes[cut_axis]) * world
            axes["dims.top_k"] = min(_integer(axes["dims.top_k"]), 2)
            return axes
        axes["dims.experts"] = max(_integer(axes["dims.experts"]), world)
        axes["dims.intermediate"] = max(_integer(axes["dims.intermediate"]), 2 * world)
        return axes

    def problem(self, case: Case) -> Problem:
        return MoeExpertsProblem(case)


def _integer(value: Choice) -> int:
    assert isinstance(value, int)
    return value


SUMMED_SETS: tuple[ProblemSet, ...] = (EmbeddingProblems(), MoeExpertsProblems())
