"""``storage.weight``: what is written to a weight, in whatever pieces and order, is what it holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import Quantisation, Slice, Weight, WeightSpec
from polyaccel.backend.support import Static
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.device_check import DeviceCheck, DeviceProblem, Facts
from polyaccel_conformance.formats import FORMATS, from_torch, to_torch
from polyaccel_conformance.problem import Prepared, Problem
from polyaccel_conformance.problems.expert_weights import Codes

Floats = npt.NDArray[np.float64]
Piece = tuple[int, int | None, int, int, int, int]
"""Slice, expert, first and last row, first and last column of one write."""

FORMS = ("float", "int4", "int8")
ORDERS = ("whole", "rows", "columns", "blocks", "shuffled")
SOURCES = ("same", "wider", "strided", "offset")
LIVES = ("once", "rewritten", "tied", "lookup")


class WeightProblem(DeviceProblem):
    """Write, seal, read back; write again; refuse what does not fit."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        n, k, experts = case.dim("n"), case.dim("k"), case.dim("experts")
        third = n // 3
        widths = {"one": (n,), "pair": (n - n // 2, n // 2), "three": (n - 2 * third, third, third)}
        self.life = str(case.structure["life"])
        self.spec_of_weight = WeightSpec(
            site="stored",
            slices=tuple(Slice(name=f"s{i}", n=w) for i, w in enumerate(widths[str(case.structure["slices"])])),
            k=k,
            dtype=FORMATS[case.dtype].torch,
            bias=bool(case.structure["bias"]),
            quantisation=self._quantisation(),
            experts=experts or None,
            lookup=self.life == "lookup",
        )

    # -- the drive -----------------------------------------------------------------------------------------------------

    def drive(self, bench: Bench, facts: Facts) -> None:
        spec = self.spec_of_weight
        weight = bench.backend.allocate_weight(spec, bench.device)
        tied: Weight | None = None
        if self.life == "tied":
            tied = bench.backend.allocate_weight(_tied(spec), bench.device, weight)
        content, bias = self._content("first"), self._bias("first")
        self._write(bench, weight, content, bias)
        self._seal(weight, tied)
        self._compare(bench, facts, "written", (weight, tied), content, bias)
        self._seal(weight, tied)
        self._compare(bench, facts, "sealed twice", (weight, tied), content, bias)
        self._refusals(facts, weight, tied)
        self._compare(bench, facts, "after refused writes", (weight, tied), content, bias)
        facts.check("nbytes: what is held", weight.nbytes >= self._least_bytes(), f"{weight.nbytes} bytes")
        if self.life == "rewritten" or tied is not None:
            content, bias = self._content("second"), self._bias("second")
            for each in (weight, tied):
                if each is not None:
                    each.reopen()
            self._write(bench, weight, content, bias)
            self._seal(weight, tied)
            self._compare(bench, facts, "written again", (weight, tied), content, bias)

    def _write(self, bench: Bench, weight: Weight, content: Codes | Floats, bias: Floats | None) -> None:
        pieces = self._pieces()
        for number, (index, expert, row, end, col, stop) in enumerate(pieces):
            if self.sabotaged and number == len(pieces) - 1:
                continue
            begin = self.spec_of_weight.starts[index]
            rows, columns = slice(begin + row, begin + end), slice(col, stop)
            if isinstance(content, Codes):
                size = content.quantisation.group_size
                groups = slice(col // size, col // size + content.quantisation.groups(stop - col))
                parts = (
                    torch.from_numpy(content.codes[expert or 0, rows, columns].astype(np.uint8)),
                    torch.from_numpy(content.zeros[expert or 0, rows, groups].astype(np.uint8)),
                    torch.from_numpy(content.scales[expert or 0, rows, groups]).to(content.quantisation.scale_dtype),
                )
                weight.write_quantised(index, *parts, row=row, col=col, expert=expert)
            else:
                source = self._source(content[expert or 0, rows, columns])
                weight.write(index, source, row=row, col=col, expert=expert)
                # The contract: the source may be reused when this returns.
                source.fill_(float("nan"))
        if bias is not None:
            for index, part in enumerate(self.spec_of_weight.slices):
                for expert in self._experts():
                    self._write_bias(weight, bias, index, part.n, expert)

    def _write_bias(self, weight: Weight, bias: Floats, index: int, n: int, expert: int | None) -> None:
        begin = self.spec_of_weight.starts[index]
        where = {} if expert is None else {"expert": expert}
        half = n // 2 if self.case.structure["order"] != "whole" else 0
        for row, end in ((half, n), (0, half)):
            if end > row:
                source = to_torch(bias[expert or 0, begin + row : begin + end], self.case.dtype)
                weight.write_bias(index, source, row=row, **where)

    def _seal(self, weight: Weight, tied: Weight | None) -> None:
        weight.seal()
        if tied is not None:
            tied.seal()

    def _compare(
        self,
        bench: Bench,
        facts: Facts,
        when: str,
        weights: tuple[Weight, Weight | None],
        content: Codes | Floats,
        bias: Floats | None,
    ) -> None:
        values = content.dequantised(self.case.dtype) if isinstance(content, Codes) else content
        wanted = to_torch(FORMATS[self.case.dtype].round(values), self.case.dtype)
        if self.spec_of_weight.experts is None:
            wanted = wanted[0]
        for name, weight in zip(("weight", "tied weight"), weights, strict=True):
            if weight is None:
                continue
            got = bench.backend.dequantize(weight)
            bench.synchronize()
            # A copy: what dequantize returns may be a view with any strides, and a product (q - z) s may be -0.
            facts.same(f"{when}: {name} dequantised", got.to("cpu", copy=True) + 0.0, wanted + 0.0)
            if self._multiplies:
                self._compare_linear(bench, facts, f"{when}: {name} by linear", weight, wanted, bias)

    @property
    def _multiplies(self) -> bool:
        spec = self.spec_of_weight
        return spec.experts is None and not spec.lookup and spec.k <= 64

    def _compare_linear(
        self, bench: Bench, facts: Facts, name: str, weight: Weight, wanted: torch.Tensor, bias: Floats | None
    ) -> None:
        """Unit rows select columns exactly; with a bias, the row of zeros gives it."""
        spec, k = weight.spec, weight.spec.k
        own = bias is not None and spec.bias
        static: dict[str, Static] = {
            "dtype": self.case.dtype,
            "k": k,
            "slices": tuple(part.n for part in spec.slices),
            "bias": spec.bias,
            "world_size": 1,
            "quantised": spec.quantisation is not None,
        }
        x = torch.zeros((1, k), dtype=wanted.dtype) if own else torch.eye(k, dtype=wanted.dtype)
        prepared = Prepared(
            arguments={}, collect=lambda result, _: {}, static=static, ranges={"tokens": (1, max(k, 1))}
        )
        y = bench.resolve("linear", prepared).call(bench.upload(x), weight)
        bench.synchronize()
        assert isinstance(y, torch.Tensor)
        expected = wanted.T if not own or bias is None else to_torch(bias, self.case.dtype)
        same = np.array_equal(from_torch(y), from_torch(expected))
        facts.check(name, same, f"{from_torch(y)} instead of {from_torch(expected)}")

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _refusals(self, facts: Facts, weight: Weight, tied: Weight | None) -> None:
        spec = self.spec_of_weight
        own = None if spec.experts is None else 0
        n, count = spec.slices[0].n, len(spec.slices)
        size = 1 if spec.quantisation is None else spec.quantisation.group_size
        beyond = -(-spec.k // size) * size

        def refused(
            name: str,
            value: object,
            index: int = 0,
            row: int = 0,
            col: int = 0,
            rows: int = 1,
            expert: int | None = own,
        ) -> None:
            facts.refused(name, lambda: self._write_ones(weight, index, row, col, rows, expert), str(value))

        refused("write to a sealed weight", spec.site)
        weight.reopen()
        refused("slice beyond the last", count, index=count)
        refused("negative slice", -1, index=-1)
        refused("row beyond the slice", n, row=n)
        refused("negative row", -1, row=-1)
        refused("more rows than the slice has", n + 1, rows=n + 1)
        refused("column beyond the slice", beyond, col=beyond)
        refused("negative column", -size, col=-size)
        if spec.experts is None:
            refused("an expert of a weight without", 0, expert=0)
        else:
            refused("expert beyond the last", spec.experts, expert=spec.experts)
            refused("no expert", None, expert=None)
        if size > 1 and spec.k > 1:
            refused("column inside a group", 1, col=1)
        if not spec.bias:
            vector, where = torch.zeros(1, dtype=spec.dtype), {} if own is None else {"expert": own}
            facts.refused("a bias where there is none", lambda: weight.write_bias(0, vector, **where), spec.site)
        weight.seal()
        if tied is not None:
            tied.reopen()
            facts.refused("write to a tied weight", lambda: self._write_ones(tied, 0, 0, 0, 1, own), spec.site)
            tied.seal()

    def _write_ones(self, weight: Weight, index: int, row: int, col: int, rows: int, expert: int | None) -> None:
        """One column of ``rows`` rows."""
        spec = self.spec_of_weight
        if spec.quantisation is None:
            weight.write(index, torch.ones((rows, 1), dtype=spec.dtype), row=row, col=col, expert=expert)
            return
        ones = torch.ones((rows, 1), dtype=torch.uint8)
        scales = torch.ones((rows, 1), dtype=spec.quantisation.scale_dtype)
        weight.write_quantised(index, ones, ones, scales, row=row, col=col, expert=expert)

    # -- content -------------------------------------------------------------------------------------------------------

    def _experts(self) -> tuple[int | None, ...]:
        experts = self.spec_of_weight.experts
        return (None,) if experts is None else tuple(range(experts))

    def _quantisation(self) -> Quantisation | None:
        form = str(self.case.structure["form"])
        if form == "float":
            return None
        size = self.case.structure["group_size"]
        assert isinstance(size, int)
        scales = FORMATS[str(self.case.structure["scale_dtype"])]
        return Quantisation(bits=int(form.removeprefix("int")), group_size=size, scale_dtype=scales.torch)

    def _content(self, name: str) -> Codes | Floats:
        spec, quantisation = self.spec_of_weight, self.spec_of_weight.quantisation
        shape = (spec.experts or 1, spec.n, spec.k)
        if quantisation is None:
            drawn = self.source.normal(name, shape)
            # A wider source is rounded on the way.
            kept = "float32" if self.case.structure["source"] == "wider" else self.case.dtype
            return FORMATS[kept].round(drawn)
        groups, most = (*shape[:2], quantisation.groups(shape[2])), 2**quantisation.bits - 1
        scales = FORMATS[str(self.case.structure["scale_dtype"])].round(self.source.normal(f"{name} scales", groups))
        return Codes(
            codes=self.source.integers(f"{name} codes", shape, 0, most),
            zeros=self.source.integers(f"{name} zeros", groups, 0, most),
            scales=scales,
            quantisation=quantisation,
        )

    def _bias(self, name: str) -> Floats | None:
        spec = self.spec_of_weight
        if not spec.bias:
            return None
        drawn = self.source.normal(f"{name} bias", (spec.experts or 1, spec.n))
        return FORMATS[self.case.dtype].round(drawn)

    def _pieces(self) -> list[Piece]:
        """Every element of the weight in one piece each."""
        spec, order = self.spec_of_weight, self.case.structure["order"]
        size = 1 if spec.quantisation is None else spec.quantisation.group_size
        found: list[Piece] = []
        for index, part in enumerate(spec.slices):
            rows = [0, part.n] if order in ("whole", "columns") else sorted({0, part.n // 3, part.n // 2, part.n})
            cuts = {0, spec.k // 2 // size * size, spec.k // 3 // size * size, spec.k}
            columns = [0, spec.k] if order in ("whole", "rows") else sorted(cuts)
            for expert in self._experts():
                found += [
                    (index, expert, row, end, col, stop)
                    for row, end in itertools.pairwise(rows)
                    for col, stop in itertools.pairwise(columns)
                    if end > row and stop > col
                ]
        if order == "shuffled":
            return [found[i] for i in self.source.permutation("order", len(found)).tolist()]
        return found

    def _source(self, values: Floats) -> torch.Tensor:
        kind = self.case.structure["source"]
        if kind == "wider":
            return to_torch(values, "float32")
        tensor = to_torch(values, self.case.dtype)
        if kind == "strided":
            wide = torch.zeros((tensor.shape[1], 2 * tensor.shape[0]), dtype=tensor.dtype)
            wide[:, ::2] = tensor.T
            return wide[:, ::2].T
        if kind == "offset":
            buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
            buffer[1:] = tensor.reshape(-1)
            return buffer[1:].view(tensor.shape)
        return tensor

    def _least_bytes(self) -> int:
        spec = self.spec_of_weight
        rows = (spec.experts or 1) * spec.n
        bias = rows * spec.dtype.itemsize if spec.bias else 0
        if spec.quantisation is None:
            return bias + rows * spec.k * spec.dtype.itemsize
        groups = rows * spec.quantisation.groups(spec.k)
        scales = groups * spec.quantisation.scale_dtype.itemsize
        return bias + scales + (rows * spec.k + groups) * spec.quantisation.bits // 8


def _tied(spec: WeightSpec) -> WeightSpec:
    return WeightSpec(
        site="tied",
        slices=spec.slices,
        k=spec.k,
        dtype=spec.dtype,
        quantisation=spec.quantisation,
        experts=spec.experts,
        tied_to=spec.site,
    )


class WeightStorage(DeviceCheck):
    """Float and quantised weights, with and without experts and bias, written in every order."""

    operator = "storage.weight"
    levels = ("L1",)

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.n": (8, 1, 3, 16, 17, 48),
            "dims.k": (8, 1, 15, 16, 33, 64, 130),
            "dims.experts": (0, 1, 3),
            "structure.slices": ("one", "pair", "three"),
            "structure.bias": (False, True),
            "structure.form": FORMS,
            "structure.group_size": (32, 8, 128),
            "structure.scale_dtype": ("float16", "bfloat16", "float32"),
            "structure.order": ORDERS,
            "structure.source": SOURCES,
            "structure.life": LIVES,
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.n": (1, 64), "dims.k": (1, 140), "dims.experts": (0, 4)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """Every slice has a row; an embedding table is one float matrix without a bias."""
        slices, n = axes["structure.slices"], axes["dims.n"]
        assert isinstance(n, int)
        if axes["structure.life"] == "lookup":
            axes = axes | {"dims.experts": 0, "structure.bias": False, "structure.form": "float"}
            slices = "one"
        least = {"one": 1, "pair": 2, "three": 3}[str(slices)]
        return axes | {"dims.n": max(n, least), "structure.slices": slices}

    def problem(self, case: Case) -> Problem:
        return WeightProblem(case)
