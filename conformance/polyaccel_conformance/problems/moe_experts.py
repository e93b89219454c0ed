"""Cases of ``moe_experts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polyaccel.backend import AdapterRows, DeviceState, Quantisation, Weight
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS, format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected, finish
from polyaccel_conformance.oracle.moe import ExpertDelta, experts
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.apart import token, triples
from polyaccel_conformance.problems.expert_weights import Codes, ExpertModule, ExpertWeight, place_adapters
from polyaccel_conformance.problems.placed import PlacedProblem
from polyaccel_conformance.problems.steps import SEGMENTS, adapter_rows, row_step
from polyaccel_conformance.problems.weights import tensor_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

GATE_UP, DOWN = "experts.gate_up", "experts.down"
EXACT_KINDS = ("integers", "cancelling")
STEEP = 128.0
"""From here on silu is its argument, and zero below the negative."""
SLOTS = 4
RANKS: Mapping[str, tuple[int, ...]] = {"one": (1, 1), "mixed": (3, 8), "wide": (16, 5)}
"""True ranks of the adapters in the filled slots; the others are empty."""
FILLED = (1, 3)
EMPTY = 2


class MoeExpertsProblem(PlacedProblem[tuple[Weight, Weight, DeviceState]]):
    """``sum_j weights[t, j] * down_e(act(gate_up_e(x[t])))`` over the experts that this rank holds.

    ``integers``: one column of x decides each gate (-1, 0 or 1 times 128, where silu is zero or its argument), another
    one is what passes; rows of every matrix select columns, differently in each expert. Every intermediate result is
    exact in 16 bits. ``cancelling``: as before, and two columns with the same values are added to every sum with large
    factors of opposite sign, so that an accumulator with fewer bits loses what was selected.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.exact = case.data in EXACT_KINDS
        tokens, hidden, inner = case.dim("tokens"), case.dim("hidden"), case.dim("intermediate")
        self._ids, self._map, self.local = self._routing(tokens)
        held = int(self._held)
        self._switches = max(hidden // 2, 1)
        ranks = RANKS[str(case.structure["ranks"])]
        self.rank_rows = sum(ranks) + 2 if case.structure["adapters"] != "none" else 0
        self.gate_up = self._weight(GATE_UP, held, (inner, inner), hidden)
        self.down = self._weight(DOWN, held, (hidden,), inner)
        self.adapters = self._draw_adapters(dict(zip(FILLED, ranks, strict=True)), held)
        self.triples = self._draw_triples(tokens)
        self.operands = {
            "x": self._draw_x(tokens, hidden),
            "ids": Operand(self._ids, "int32"),
            "weights": self._draw_weights(self._ids.shape),
        }
        if self._map is not None:
            self.operands["expert_map"] = Operand(self._map, "int32")

    def prepare(self, bench: Bench) -> Prepared:
        case = self.case
        gate_up, down, state = self.stored(bench)
        inputs = row_step(self.source, case.dim("tokens"), adapters=self.triples)
        codes = self.gate_up.codes
        return Prepared(
            arguments={
                "gate_up": gate_up,
                "down": down,
                "step": bench.begin_step(inputs, state),
                "act": case.attributes["act"],
            },
            collect=lambda result, _: {"y": tensor_of(result)},
            static={
                "dtype": case.dtype,
                "hidden": case.dim("hidden"),
                "k": case.dim("hidden"),
                "slices": self.gate_up.slices,
                "intermediate": case.dim("intermediate"),
                "act": str(case.attributes["act"]),
                "quantised": codes is not None,
                "group_size": 0 if codes is None else codes.quantisation.group_size,
                "expert_map": self._map is not None,
                "experts": case.dim("experts"),
                "top_k": case.dim("top_k"),
                "world_size": 1,
                "largest_rank": max((m.a.shape[0] for ms in self.adapters.values() for m in ms), default=0),
            },
            ranges={"tokens": (case.dim("tokens"), max(case.dim("tokens"), 1))},
            adapters=inputs.has_adapters,
            again=lambda: {"step": bench.begin_step(inputs, state)},
        )

    def place(self, bench: Bench) -> tuple[Weight, Weight, DeviceState]:
        gate_up, down = self.gate_up.place(bench), self.down.place(bench)
        state = DeviceState()
        if self.rank_rows:
            store = place_adapters(
                bench,
                {GATE_UP: gate_up, DOWN: down},
                self.adapters,
                self.case.dtype,
                slots=SLOTS,
                rank_rows=self.rank_rows,
            )
            state = DeviceState(adapters=store)
        return gate_up, down, state

    def expected(self) -> Mapping[str, Expected | Exactly]:
        out = format_of(self.case.dtype)
        y = experts(
            self.operands["x"].values.astype(np.float64),
            self.gate_up.projection(),
            self.down.projection(),
            self.local,
            self.operands["weights"].values.astype(np.float64),
            (self._deltas(self.gate_up), self._deltas(self.down)),
            out,
        )
        return {"y": finish(y, out, exact=self.exact)}

    @property
    def apart(self) -> Sequence[int]:
        return range(self.case.dim("tokens"))

    def alone(self, row: int) -> Problem:
        other = token(self, row)
        other.local, other.triples = self.local[row : row + 1], triples(self.triples, row)
        return other

    def digests(self) -> dict[str, str]:
        return super().digests() | self.gate_up.digests() | self.down.digests()

    # -- routing -------------------------------------------------------------------------------------------------------

    def _routing(self, tokens: int) -> tuple[Ints, Ints | None, Ints]:
        """``ids``, the expert map or None, and this rank's number of each chosen expert."""
        case, source = self.case, self.source
        total, top_k = case.dim("experts"), case.dim("top_k")
        ids = np.argsort(source.uniform("ids", (tokens, total)), axis=1, kind="stable")[:, :top_k]
        histogram = case.structure["histogram"]
        if histogram == "one":
            # All tokens choose the same experts.
            ids = np.broadcast_to(source.choose("favourites", total, top_k), (tokens, top_k)).copy()
        elif histogram == "empty":
            # Only as many experts as a token needs, so that the others get none.
            few = np.sort(source.choose("favourites", total, top_k))
            ids = few[np.argsort(ids, axis=1, kind="stable")]
        elif histogram == "last":
            # The last expert is everybody's first choice.
            ids = np.where(ids == total - 1, ids[:, :1], ids)
            ids[:, 0] = total - 1
        mapping = self._expert_map(total)
        self._held = total if mapping is None else max(int((mapping >= 0).sum()), 1)
        if case.structure["expert_map"] == "away":
            # This rank holds one expert that nobody chose.
            self._held = 1
        return ids, mapping, ids if mapping is None else mapping[ids]

    def _expert_map(self, total: int) -> Ints | None:
        kind = self.case.structure["expert_map"]
        if kind == "none":
            return None
        if kind == "identity":
            return np.arange(total, dtype=np.int64)
        mapping = np.full(total, -1, dtype=np.int64)
        if kind == "away":
            return mapping
        if kind == "range":
            # As expert parallelism cuts: the second half.
            own = np.arange(total // 2, total)
        else:
            own = np.sort(self.source.choose("held", total, (total + 1) // 2))
        local = np.arange(len(own)) if kind == "range" else self.source.permutation("local", len(own))
        mapping[own] = local
        return mapping

    # -- operands ------------------------------------------------------------------------------------------------------

    def _draw_x(self, tokens: int, hidden: int) -> Operand:
        case, source = self.case, self.source
        if not self.exact:
            x = source.normal("x", (tokens, hidden))
            if case.data == "outliers" and hidden:
                x[:, source.choose("hot", hidden, max(hidden // 32, 1))] *= 16
            return Operand.rounded(x, case.dtype)
        # float32 operands need more than 11 bits, or a narrower product would pass.
        most = 4095 if case.dtype == "float32" else 3
        values = source.integers("x", (tokens, hidden), -most, most)
        values[:, : self._switches] = source.integers("switch", (tokens, self._switches), -1, 1)
        if hidden > self._switches:
            values[:, -1] = values[:, self._switches]
        return Operand.rounded(values, case.dtype)

    def _draw_weights(self, shape: tuple[int, ...]) -> Operand:
        if self.exact:
            return Operand(2.0 ** self.source.integers("weights", shape, -1, 0), "float32")
        return Operand.rounded(self.source.uniform("weights", shape), "float32")

    def _weight(self, site: str, held: int, slices: tuple[int, ...], k: int) -> ExpertWeight:
        case, source, n = self.case, self.source, sum(slices)
        values = self._selections(site, held, slices, k) if self.exact else None
        codes = None
        if case.structure["quantised"]:
            codes = self._codes(site, (held, n, k), values, self._quantisation())
            values = codes.dequantised(case.dtype)
        elif values is None:
            values = source.normal(site, (held, n, k)) / np.sqrt(max(k, 1))
        bias = None
        if case.structure["bias"]:
            bias = Operand.rounded(self._draw_bias(site, held, slices), case.dtype)
        return ExpertWeight(
            site=site,
            matrix=Operand.rounded(values, case.dtype),
            bias=bias,
            slices=slices,
            codes=codes,
            rank_rows=self.rank_rows,
        )

    def _draw_bias(self, site: str, held: int, slices: tuple[int, ...]) -> Floats:
        if not self.exact:
            return self.source.normal(f"{site} bias", (held, sum(slices)))
        bias = self.source.integers(f"{site} bias", (held, sum(slices)), -4, 4).astype(np.float64)
        if site == GATE_UP:
            # Gates stay multiples of 128; where they may be large, what passes them stays small.
            bias[:, : slices[0]] = STEEP * np.sign(bias[:, : slices[0]])
            bias[::2, slices[0] :] = 0.0
        return bias

    def _quantisation(self) -> Quantisation:
        bits, size = self.case.structure["bits"], self.case.structure["group_size"]
        assert isinstance(bits, int)
        assert isinstance(size, int)
        scales = FORMATS[str(self.case.structure["scale_dtype"])]
        return Quantisation(bits=bits, group_size=size, scale_dtype=scales.torch)

    def _selections(self, site: str, held: int, slices: tuple[int, ...], k: int) -> Floats:
        """``[held, n, k]`` with one entry a row: 128 for gates, a code of the expert for up, +-1/128 for down."""
        matrix = np.zeros((held, sum(slices), k))
        if not k:
            return matrix
        begin = 0
        for index, n in enumerate(slices):
            low, high = self._columns(site, index, k)
            column = self.source.integers(f"{site} {index} column", (held, n), low, high - 1)
            code = 1 + np.arange(held)[:, None] % 3
            sign = 1 - 2 * self.source.integers(f"{site} {index} sign", (held, n), 0, 1)
            entry = STEEP * np.ones((held, n)) if site == GATE_UP and index == 0 else code * np.ones((held, n))
            if site == DOWN:
                entry = sign / STEEP
            np.put_along_axis(matrix[:, begin : begin + n], column[..., None], entry[..., None], 2)
            begin += n
        if self.case.data == "cancelling" and not self.case.structure["quantised"]:
            self._cancel(site, matrix, slices)
        return matrix

    def _cancel(self, site: str, matrix: Floats, slices: tuple[int, ...]) -> None:
        """Add twin columns of opposite sign to what passes the gates, and to down where its input has twins."""
        large = 2.0**8 if self.case.dtype == "float32" else 2.0**12
        k = matrix.shape[2]
        if site == GATE_UP and k > self._switches + 1:
            up = matrix[:, slices[0] :]
            up[..., self._switches] += large
            up[..., -1] -= large
        if self.case.structure["adapters"] != "none" or self.case.structure["bias"]:
            return
        if site == GATE_UP and slices[0] > 1:
            for end in (slices[0], sum(slices)):
                matrix[:, end - 1] = matrix[:, end - slices[0]]
        elif site == DOWN and k > 1:
            matrix[..., 0] += large / STEEP
            matrix[..., -1] -= large / STEEP

    def _columns(self, site: str, index: int, k: int) -> tuple[int, int]:
        """Columns that a slice selects from: gates see the switches, up sees the rest."""
        if site == DOWN:
            return 0, k
        return (0, self._switches) if index == 0 else (min(self._switches, k - 1), k)

    def _codes(self, site: str, shape: tuple[int, ...], wanted: Floats | None, quantisation: Quantisation) -> Codes:
        groups = (*shape[:2], quantisation.groups(shape[2]))
        most = 2**quantisation.bits - 1
        if wanted is None:
            codes = self.source.integers(f"{site} codes", shape, 0, most)
            zeros = self.source.integers(f"{site} zeros", groups, 0, most)
            spread = (1 + 2 * self.source.uniform(f"{site} scales", groups)) / (most * np.sqrt(max(shape[2], 1)))
            scales = format_of(quantisation.scale_dtype).round(spread)
            return Codes(codes=codes, zeros=zeros, scales=scales, quantisation=quantisation)
        # One scale a row, so that its entry is a small integer times it; the sign is the scale's.
        scale = np.sign(wanted.sum(-1, keepdims=True)) * np.where(site == DOWN, 1 / STEEP, 1.0)
        gates = np.abs(wanted).max(-1, keepdims=True) >= STEEP
        scale = np.where(scale == 0, 1.0, np.where(gates, STEEP, scale))
        scales = np.broadcast_to(scale, groups).copy()
        zeros = self.source.integers(f"{site} zeros", groups, 0, most - 4)
        group = np.arange(shape[2]) // quantisation.group_size
        steps = np.rint(wanted / scale).astype(np.int64)
        return Codes(codes=steps + zeros[..., group], zeros=zeros, scales=scales, quantisation=quantisation)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def _draw_adapters(self, ranks: Mapping[int, int], held: int) -> dict[int, list[ExpertModule]]:
        """By slot, modules of the slot's rank or one less: for two of three (slice, expert) pairs, of the last slot for
        one of three."""
        if not self.rank_rows:
            return {}
        found: dict[int, list[ExpertModule]] = {}
        for slot, rank in ranks.items():
            modules: list[ExpertModule] = []
            taken = (1,) if slot == FILLED[-1] else (1, 2)
            for weight in (self.gate_up, self.down):
                for index in range(len(weight.slices)):
                    a, b = self._matrices(weight, index, rank, slot, held)
                    for expert in range(held):
                        if (slot + index + expert) % 3 in taken and modules:
                            own = max(rank - expert % 2, 1)
                            modules.append(_module(weight.site, index, expert, a[expert, :own], b[expert, :, :own]))
                        elif not modules:
                            modules.append(_module(weight.site, index, expert, a[expert], b[expert]))
            found[slot] = modules
        return found

    def _matrices(self, weight: ExpertWeight, index: int, rank: int, slot: int, held: int) -> tuple[Floats, Floats]:
        """``a: [experts, rank, k]`` and ``b: [experts, n, rank]`` of one slice."""
        source, k, n = self.source, weight.matrix.shape[2], weight.slices[index]
        name = f"{weight.site} {index} {slot}"
        rounded = FORMATS[self.case.dtype].round
        if not self.exact:
            a = source.normal(f"a {name}", (held, rank, k)) / np.sqrt(max(k, 1))
            return rounded(a), rounded(source.normal(f"b {name}", (held, n, rank)) / np.sqrt(rank))
        a, b = np.zeros((held, rank, k)), np.zeros((held, n, rank))
        if k:
            low, high = self._columns(weight.site, index, k)
            column = source.integers(f"a {name}", (held, rank), low, high - 1)
            np.put_along_axis(a, column[..., None], 1.0, 2)
        # Multiples of four, since mix weights go down to a quarter. An expert's adapter changes either gates or what
        # passes them, so that the product stays within 8 bits.
        entry = 4.0 * (1 - 2 * source.integers(f"b {name}", (held, n), 0, 1))
        odd = np.arange(held)[:, None] % 2
        entry *= 1 / STEEP if weight.site == DOWN else STEEP * (1 - odd) if index == 0 else odd
        # The truncated rank of odd experts must not lose the entry.
        columns = np.arange(n)[None, :] % np.maximum(rank - odd, 1)
        np.put_along_axis(b, columns[..., None], entry[..., None], 2)
        return a, b

    def _draw_triples(self, tokens: int) -> AdapterRows:
        mix = "power" if self.exact else str(self.case.structure["mix"])
        return adapter_rows(
            self.source, tokens, FILLED, str(self.case.structure["adapters"]), mix=mix, empty_slot=EMPTY
        )

    def _deltas(self, weight: ExpertWeight) -> tuple[ExpertDelta, ...]:
        held, _, k = weight.matrix.shape
        found = []
        for slot, modules in self.adapters.items():
            mix = np.zeros(self.case.dim("tokens"))
            mine = self.triples.slots == slot
            np.add.at(mix, self.triples.rows[mine], self.triples.weights[mine])
            for index, n in enumerate(weight.slices):
                own = [m for m in modules if m.site == weight.site and m.slice == index]
                if not own or not mix.any():
                    continue
                rank = max(m.a.shape[0] for m in own)
                a, b = np.zeros((held, rank, k)), np.zeros((held, n, rank))
                for module in own:
                    a[module.expert, : module.a.shape[0]] = module.a
                    b[module.expert, :, : module.a.shape[0]] = module.b
                found.append(ExpertDelta(slice=index, a=a, b=b, mix=mix))
        return tuple(found)


def _module(site: str, index: int, expert: int, a: Floats, b: Floats) -> ExpertModule:
    return ExpertModule(site=site, slice=index, expert=expert, a=a, b=b)


class MoeExpertsProblems(ProblemSet):
    """Float and quantised experts, with and without adapters, on all of the experts or a part of them."""

    operator = "moe_experts"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": (1, 0, 2, 5, 16, 17),
            "dims.hidden": (8, 1, 2, 15, 16, 33),
            "dims.intermediate": (8, 1, 2, 16, 31),
            "dims.experts": (2, 1, 3, 4),
            "dims.top_k": (1, 2, 4),
            "structure.quantised": (False, True),
            "structure.bits": (4, 8),
            "structure.group_size": (32, 8, 128),
            "structure.scale_dtype": ("float16", "bfloat16", "float32"),
            "structure.bias": (False, True),
            "structure.histogram": ("random", "one", "empty", "last"),
            "structure.expert_map": ("none", "identity", "holes", "range", "away"),
            "structure.adapters": ("none", *(s for s in SEGMENTS if s != "none")),
            "structure.ranks": ("one", "mixed", "wide"),
            "structure.mix": ("one", "power", "any"),
            "attributes.act": ("silu",),
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "layouts.ids": ("contiguous", "row_padded", "offset"),
            "layouts.weights": ("contiguous", "row_padded", "offset"),
            "layouts.expert_map": ("contiguous", "row_padded", "offset"),
            "data": ("normal", *EXACT_KINDS, "outliers"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {
            "dims.tokens": (0, 24),
            "dims.hidden": (1, 80),
            "dims.intermediate": (1, 80),
            "dims.experts": (1, 8),
            "dims.top_k": (1, 8),
        }

    def large(self) -> Sequence[Mapping[str, Choice]]:
        sizes: dict[str, Choice] = {"dims.tokens": 33, "dims.hidden": 65, "dims.intermediate": 48}
        more: dict[str, Choice] = {"dims.experts": 8, "dims.top_k": 2}
        return (sizes | more, sizes | more | {"data": "cancelling", "structure.histogram": "last"})

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """No more choices than experts; adapters on many experts serve few tokens, and quantised experts few choices of
        many."""
        top_k, total, tokens = axes["dims.top_k"], axes["dims.experts"], axes["dims.tokens"]
        assert isinstance(top_k, int)
        assert isinstance(total, int)
        assert isinstance(tokens, int)
        if total > 2 and tokens > 5:
            axes = axes | {"structure.adapters": "none"}
        if axes["structure.quantised"] and tokens > 5:
            top_k = min(top_k, 2)
        return axes | {"dims.top_k": min(top_k, total)}

    def problem(self, case: Case) -> Problem:
        return MoeExpertsProblem(case)
