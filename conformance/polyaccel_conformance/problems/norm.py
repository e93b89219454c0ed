"""Cases of ``rms_norm`` and ``layer_norm``.

Exact rows (``integers``) are one multiset of small integers in random orders and signs, with the eps that makes the
statistic a power of four. The normalised row is then a power of two times integers, and its product with an integer
weight, which needs rounding in 16 bits, is settled: no float32 error changes the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import Format, format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.norm import layer_norm, residual_sum, rms_norm
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.rows import (
    RANDOM_KINDS,
    SIZES,
    TOKENS,
    coarsest,
    completing,
    draw,
    first_of,
    poison_row,
    settled,
    shuffled,
)
from polyaccel_conformance.problems.weights import tensor_of
from polyaccel_conformance.words import Source

Floats = npt.NDArray[np.float64]

EXACT = "integers"
_CHOICES = 6


class NormProblem(Problem):
    """What both norms share: ``x: [tokens, hidden]`` or ``[tokens, 3, hidden]``, as of the heads of q and k."""

    outputs: tuple[str, ...]

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.format = format_of(case.dtype)
        self.hidden = case.dim("hidden")
        self.shape = (case.dim("tokens"), *((3,) if case.structure["heads"] else ()), self.hidden)
        self.rows = int(np.prod(self.shape[:-1]))
        eps = case.attributes["eps"]
        assert isinstance(eps, float)
        self.eps = eps
        # In float32 the contract's units in the last place remain.
        self.exact = case.data == EXACT and case.dtype != "float32"

    def prepare(self, bench: Bench) -> Prepared:
        case, names = self.case, self.outputs

        def collect(result: object, _: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            parts = result if isinstance(result, tuple) else (result,)
            return {name: tensor_of(part) for name, part in zip(names, parts, strict=True)}

        return Prepared(
            arguments={"eps": self.eps},
            collect=collect,
            static={"dtype": case.dtype, "hidden": self.hidden, "world_size": 1},
            ranges={"tokens": (case.dim("tokens"), max(case.dim("tokens"), 1))},
        )

    def drawn_weight(self) -> Operand:
        weight = self.source.normal("weight", (self.hidden,))
        if self.case.data == "overflow":
            # Results on both sides of the largest number.
            weight[::2] = np.sign(weight[::2]) * self.format.max * (0.3 + 0.6 * np.abs(weight[::2] / 5))
        return self.rounded(weight)

    def rounded(self, values: npt.ArrayLike) -> Operand:
        return Operand.rounded(values, self.case.dtype)


class RmsNormProblem(NormProblem):
    """``s * rsqrt(mean(s^2) + eps) * weight``, with s = x or x + residual."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.outputs = ("normed", "s") if case.structure["residual"] else ("normed",)
        exact, source = case.data == EXACT, self.source
        aliased = case.alias == "residual=x"
        if exact:
            s = shuffled(source, "order", rms_pattern(self.hidden), self.rows).reshape(self.shape)
            s = s * (1 - 2 * source.integers("sign", self.shape, 0, 1))
            residual = s / 2 if aliased else source.integers("residual", self.shape, -8, 8).astype(np.float64)
            x = s - residual if case.structure["residual"] else s
            weight = self.rounded(_settled_weight(source, self.hidden, self.format))
        else:
            x, residual = (draw(source, name, self.shape, case.data) for name in ("x", "residual"))
            if case.data == "nonfinite":
                x = poison_row(source, x)
            weight = self.drawn_weight()
        self.operands = {"x": self.rounded(x), "weight": weight}
        if case.structure["residual"]:
            self.operands["residual"] = self.operands["x"] if aliased else self.rounded(residual)

    def expected(self) -> Mapping[str, Expected | Exactly]:
        case, numerics = self.case, self.spec.numerics
        x = self.operands["x"].values.astype(np.float64)
        s, found = Bounded.exact(x), {}
        if "residual" in self.operands:
            total, s = residual_sum(x, self.operands["residual"].values.astype(np.float64), self.format)
            found["s"] = finish(total, self.format, exact=case.data == EXACT)
        with np.errstate(invalid="ignore", over="ignore"):
            y = rms_norm(
                s,
                self.operands["weight"].values.astype(np.float64),
                self.eps,
                normed=coarsest(self.spec, "normed", case.dtype),
                rsqrt_ulps=numerics.ulps["rsqrt"],
                exact_sum=case.data == EXACT,
            )
            return {"normed": finish(y, self.format, exact=bool(self.exact)), **found}


class LayerNormProblem(NormProblem):
    """``(x - mean) * rsqrt(var + eps) * weight + bias``."""

    outputs = ("y",)

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        source, bias = self.source, None
        if case.data == EXACT:
            pattern = layer_pattern(self.hidden)
            x = shuffled(source, "order", pattern, self.rows).reshape(self.shape)
            x = x + source.integers("mean", (*self.shape[:-1], 1), -64, 64)
            scale = float(np.exp2(np.rint(-0.5 * np.log2(np.mean(pattern**2) + self.eps))))
            values = np.unique(pattern) * scale
            weights, biases = _settled_affine(source, self.hidden, self.format, values, bool(case.structure["bias"]))
            weight = self.rounded(weights)
            bias = self.rounded(biases)
        else:
            x = draw(source, "x", self.shape, case.data)
            if case.data == "shifted":
                # As far as leaves the format some bits for the row's own variation.
                x = x + self.format.unit**-0.5 / 4
            elif case.data == "nonfinite":
                x = poison_row(source, x)
            weight, bias = self.drawn_weight(), self.rounded(source.normal("bias", (self.hidden,)))
        self.operands = {"x": self.rounded(x), "weight": weight}
        if case.structure["bias"]:
            self.operands["bias"] = bias

    def expected(self) -> Mapping[str, Expected | Exactly]:
        bias = self.operands.get("bias")
        with np.errstate(invalid="ignore", over="ignore"):
            y = layer_norm(
                self.operands["x"].values.astype(np.float64),
                self.operands["weight"].values.astype(np.float64),
                None if bias is None else bias.values.astype(np.float64),
                self.eps,
                rsqrt_ulps=self.spec.numerics.ulps["rsqrt"],
            )
            return {"y": finish(y, self.format, exact=bool(self.exact))}


class RmsNormProblems(ProblemSet):
    """With and without a residual, also the residual being x itself."""

    operator = "rms_norm"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.hidden": SIZES,
            "attributes.eps": (1e-5, 1e-6, 1e-3, 1.0),
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "layouts.weight": ("contiguous", "offset"),
            "layouts.residual": ("contiguous", "row_padded", "offset"),
            "structure.residual": (False, True),
            "structure.heads": (False, True),
            "alias": ("none", "residual=x"),
            "data": ("normal", EXACT, *RANDOM_KINDS[1:], "overflow"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.hidden": (1, 400)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["alias"] != "none":
            axes["structure.residual"] = True
            axes["layouts.residual"] = axes["layouts.x"]
        if axes["data"] == EXACT:
            axes["attributes.eps"] = completing(float(np.mean(rms_pattern(_size(axes, "dims.hidden")) ** 2)))
        return axes

    def problem(self, case: Case) -> Problem:
        return RmsNormProblem(case)


class LayerNormProblems(ProblemSet):
    """With and without a bias; ``shifted`` rows have a mean far above their variation."""

    operator = "layer_norm"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.hidden": SIZES,
            "attributes.eps": (1e-5, 1e-6, 1e-3, 1.0),
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "layouts.weight": ("contiguous", "offset"),
            "layouts.bias": ("contiguous", "offset"),
            "structure.bias": (False, True),
            "structure.heads": (False, True),
            "data": ("normal", EXACT, "shifted", *RANDOM_KINDS[1:], "overflow"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.hidden": (1, 400)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] == EXACT:
            axes["attributes.eps"] = completing(float(np.mean(layer_pattern(_size(axes, "dims.hidden")) ** 2)))
        return axes

    def problem(self, case: Case) -> Problem:
        return LayerNormProblem(case)


def rms_pattern(n: int) -> Floats:
    """``[n]`` of 1, 2, 3 in equal shares."""
    return (np.arange(n) % 3 + 1).astype(np.float64)


def layer_pattern(n: int) -> Floats:
    """``[n]`` of +-1, +-2, +-3 with sum zero; a single one is zero."""
    pattern = [] if n % 2 == 0 else [0.0] if n == 1 else [1.0, 1.0, -2.0]
    pairs = np.repeat(np.arange((n - len(pattern)) // 2) % 3 + 1, 2).astype(np.float64)
    pairs[1::2] *= -1
    return np.concatenate((pattern, pairs))


def _size(axes: Mapping[str, Choice], name: str) -> int:
    value = axes[name]
    assert isinstance(value, int)
    return value


def _settled_weight(source: Source, n: int, to: Format) -> Floats:
    """Integers whose products with 1, 2 and 3 are settled."""
    limit = 2 ** min(to.bits, 12) - 1
    candidates = source.integers("weight", (n, _CHOICES), -limit, limit).astype(np.float64)
    products = candidates[:, :, None] * np.array([1.0, 2.0, 3.0])
    return first_of(candidates, np.asarray(settled(products, to).all(axis=-1)), 1.0)


def _settled_affine(source: Source, n: int, to: Format, values: Floats, bias: bool) -> tuple[Floats, Floats]:
    """Integer weights and biases such that ``values * weight + bias`` is settled and no sum cancels; the biases are in
    units of the normalisation."""
    limit = 2 ** min(to.bits, 12) - 1
    weights = source.integers("weight", (n, _CHOICES), -limit, limit).astype(np.float64)
    biases = source.integers("bias", (n, _CHOICES), -limit, limit).astype(np.float64) * bias
    unit = np.abs(values[values != 0]).min(initial=1.0)
    scaled = weights[:, :, None] * values
    sums = scaled + biases[:, :, None] * unit
    good = settled(sums, to) & (np.abs(sums) >= np.abs(scaled) / 4)
    chosen = np.argmax(good.all(axis=-1), axis=1)
    any_good = good.all(axis=-1).any(axis=1)
    rows = np.arange(n)
    return np.where(any_good, weights[rows, chosen], 1.0), np.where(any_good, biases[rows, chosen] * unit, 0.0)
