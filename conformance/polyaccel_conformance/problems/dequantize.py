"""Cases of ``dequantize``: bit for bit, over every code, zero and special scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import Format, format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.weights import (
    FORMS,
    SLICES,
    HostWeight,
    Quantised,
    quantised_weight,
    split_rows,
    tensor_of,
)
from polyaccel_conformance.words import Floats

DATA = ("codes", "grid", "special", "words")
"""``codes``: random codes, zeros and scales. ``grid``: rows go through all zeros and columns through all codes.
``special``: scales of 0, the smallest and largest numbers, values at ties, either sign. ``words``: codes from
full-range words, so that the top bit of every packed one is set half of the time."""


class DequantizeProblem(Problem):
    """A weight as a plain tensor."""

    exact = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        source, n, k = self.source, case.dim("n"), case.dim("k")
        form, scale_dtype = str(case.structure["weight"]), str(case.structure["scale_dtype"])
        slices = split_rows(n, str(case.structure["slices"]))
        self.operands = {}
        quantised = None
        if form == "float":
            values = source.normal("w", (n, k))
            if case.data == "special":
                special = _special(format_of(case.dtype))
                values = special[source.integers("w special", (n, k), 0, len(special) - 1)]
            matrix = Operand.rounded(values, case.dtype)
        else:
            quantised = self._data(quantised_weight(source, case.dtype, form, n, k, scale_dtype=scale_dtype))
            matrix = quantised.values(case.dtype)
        pieces = 2 if case.structure["pieces"] else 1
        self.weight = HostWeight(matrix=matrix, slices=slices, quantised=quantised, pieces=pieces)

    def _data(self, drawn: Quantised) -> Quantised:
        data, (n, k), groups = self.case.data, drawn.codes.shape, drawn.zeros.shape[1]
        count = 2**drawn.bits
        codes, zeros, scales = drawn.codes, drawn.zeros, drawn.scales
        if data == "grid":
            column, row = np.arange(k), np.arange(n)
            codes = Operand((column * 7 + row[:, None]) % count, "uint8")
            zeros = Operand((np.arange(groups) + row[:, None]) % count, "uint8")
        elif data == "special":
            special = _special(format_of(scales.dtype))
            chosen = self.source.integers("special", (n, groups), 0, len(special) - 1)
            scales = Operand(special[chosen], scales.dtype)
        elif data == "words":
            words = self.source.words("codes", n * k).reshape(n, k)
            codes = Operand((words >> np.uint64(64 - drawn.bits)).astype(np.int64), "uint8")
        return Quantised(bits=drawn.bits, group_size=drawn.group_size, codes=codes, zeros=zeros, scales=scales)

    def prepare(self, bench: Bench) -> Prepared:
        return Prepared(
            arguments={"weight": self.weight.place(bench)},
            collect=lambda result, _: {"matrix": tensor_of(result)},
            static=self.weight.static(),
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        matrix = Bounded.exact(self.weight.matrix.values)
        return {"matrix": finish(matrix, format_of(self.case.dtype), exact=True)}

    def digests(self) -> dict[str, str]:
        return self.weight.digests()


def _special(out: Format) -> Floats:
    """Scales that rounding, subnormals and overflow depend on."""
    unit = 2.0 ** (1 - out.bits)
    tie = 1 + unit
    sizes = np.array([0.0, 1.0, tie, 2 - unit, 1 / 3, 2.0**out.emin, out.smallest, 3 * out.smallest, out.max, 0.0625])
    values: Floats = out.round(np.concatenate([sizes, -sizes]))
    return values


class DequantizeProblems(ProblemSet):
    """Float weights (a copy of what was written) and quantised ones of 4 and 8 bits."""

    operator = "dequantize"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.k": (16, 0, 1, 2, 7, 15, 17, 33, 64, 127, 128, 129, 257),
            "dims.n": (16, 1, 2, 7, 17, 33, 64),
            "structure.slices": SLICES,
            "structure.weight": (*FORMS[1:], "float"),
            "structure.scale_dtype": ("float16", "bfloat16", "float32"),
            "structure.pieces": (False, True),
            "data": DATA,
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.k": (0, 300), "dims.n": (1, 100)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        return axes

    def problem(self, case: Case) -> Problem:
        return DequantizeProblem(case)
