"""The bounds of linear, the adapters' operators and the stations hold for every legitimate implementation, and for no
coarser one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.case import Choice
from polyaccel_conformance.compare import headroom
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from tests.conformance import emulated
from tests.conformance.drawn import problems
from tests.conformance.emulated import LEGITIMATE, Form
from tests.conformance.emulation import BF16, tf32

Floats = npt.NDArray[np.float64]
Emulate = Callable[[Problem, Form], Mapping[str, Floats]]

OPERATORS: Mapping[str, Emulate] = {
    "linear": emulated.linear,
    "sgmv": emulated.sgmv,
    "sgmv_shrink": emulated.shrink,
    "sgmv_expand": emulated.expand,
    "embedding": emulated.embedding,
    "column_linear": emulated.column_linear,
    "row_parallel_linear": emulated.column_linear,
    "gate_up_act": emulated.gate_up_act,
    "row_parallel_add_norm": emulated.row_parallel_add_norm,
    "qkv_rope_cache": emulated.qkv_rope_cache,
}

SIZES: Mapping[str, tuple[Choice, ...]] = {
    "dims.tokens": (1, 2, 5),
    "dims.k": (1, 2, 7, 16, 33, 64),
    "dims.n": (1, 2, 7, 17, 33),
    "dims.rank": (1, 2, 8, 17, 33),
}


def drawn(operator: str, count: int, seed: int, **choices: tuple[Choice, ...]) -> Iterator[Problem]:
    """Small problems, unless ``choices`` say otherwise."""
    known = PROBLEM_SETS[operator].axes()
    sizes = {path.replace(".", "__"): values for path, values in SIZES.items() if path in known}
    named = {name: values for name, values in choices.items() if name.replace("__", ".") in known}
    return problems(PROBLEM_SETS[operator], count, seed, **{**sizes, **named})


def worst(problem: Problem, outputs: Mapping[str, Floats]) -> float:
    """The largest err / tol over the outputs that are numbers; infinite for a wrong exact one."""
    found = 0.0
    with np.errstate(all="ignore"):
        for name, expected in problem.expected().items():
            if isinstance(expected, Expected):
                found = max(found, headroom(expected, expected.format.round(outputs[name])))
    return found


def survey(operator: str, forms: Mapping[str, Form], found: Iterator[Problem]) -> dict[str, float]:
    ratios = dict.fromkeys(forms, 0.0)
    for problem in found:
        for name, form in forms.items():
            with np.errstate(all="ignore"):
                ratios[name] = max(ratios[name], worst(problem, OPERATORS[operator](problem, form)))
    return ratios


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", [10, pytest.param(340, marks=pytest.mark.slow)])
def test_no_legitimate_implementation_is_over(operator: str, dtype: str, count: int) -> None:
    ratios = survey(operator, LEGITIMATE, drawn(operator, count, seed=23, dtype=(dtype,)))
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1} == {}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_worst_legitimate_implementation_is_near_the_bound(operator: str, dtype: str) -> None:
    choices = {"structure__segments": ("one", "mixes", "gaps"), "structure__ids": ("inside",), "dims__tokens": (16,)}
    random = drawn(operator, 6, seed=7, dtype=(dtype,), data=("normal",), **choices)
    assert max(survey(operator, LEGITIMATE, random).values()) >= 0.1


# -- one precision class lower -----------------------------------------------------------------------------------------

LOWER_OF_FLOAT32: Mapping[str, Form] = {
    "float16 accumulator": Form(how="float16 accumulator"),
    "bfloat16 accumulator": Form(how="bfloat16 accumulator"),
    "split-K partials in bfloat16": Form(how="bfloat16 split-K"),
    "13-bit truncating accumulator": Form(how="13-bit truncating"),
    "TF32 operands": Form(how="pairwise", inputs=tf32),
    "operands of three bfloat16 parts, two kept": Form(how="pairwise", inputs=lambda x: _two_parts(x)),
}
LOWER_OF_H: Mapping[str, Form] = {
    "h in float16": Form(how="pairwise", h="float16"),
    "h in bfloat16": Form(how="pairwise", h="bfloat16"),
}
WIDE: Mapping[str, tuple[Choice, ...]] = {
    "dims__tokens": (33,),
    "dims__k": (129,),
    "dims__n": (33,),
    "dims__rank": (33,),
    "structure__segments": ("one", "each"),
    "structure__ids": ("inside",),
    "structure__ranks": ("equal",),
    "structure__weight": ("float",),
    "structure__q_norm_k_norm": (False,),
}


def _two_parts(x: npt.ArrayLike) -> Floats:
    """A float32 operand as the sum of two bfloat16 ones: 16 bits."""
    high = BF16.round(x)
    return high + BF16.round(np.asarray(x) - high)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_lower_class_of_float32_is_over_on_random_data(operator: str) -> None:
    forms = {**LOWER_OF_FLOAT32, **({} if operator in ("linear", "sgmv_expand", "embedding") else LOWER_OF_H)}
    # A lookup has no sum over k: partial sums of the rank are few.
    random = drawn(operator, 2, seed=3, dtype=("float32",), data=("normal",), **WIDE)
    ratios = survey(operator, forms, random)
    assert {name: ratio for name, ratio in ratios.items() if not ratio > 1} == {}


LOWER_OF_16_BITS: Mapping[str, Form] = {
    "bfloat16 accumulator": Form(how="bfloat16 accumulator", h="x"),
    "split-K partials in bfloat16": Form(how="bfloat16 split-K", h="x"),
    "float16 accumulator": Form(how="float16 accumulator", h="x"),
}


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "embedding"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", LOWER_OF_16_BITS)
def test_a_lower_class_of_16_bits_is_wrong_in_the_exact_tier(operator: str, dtype: str, form: str) -> None:
    """Of 16-bit outputs the rounding hides much of it from tier 2: the cancelling halves show it."""
    exact = drawn(operator, 2, seed=3, dtype=(dtype,), data=("cancelling",), **WIDE)
    assert survey(operator, {form: LOWER_OF_16_BITS[form]}, exact)[form] == np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["bfloat16 accumulator", "float16 accumulator"])
def test_an_embedding_with_a_lower_accumulator_is_wrong_in_the_exact_tier(dtype: str, form: str) -> None:
    exact = drawn("embedding", 2, seed=3, dtype=(dtype,), data=("cancelling",), **{**WIDE, "dims__rank": (128,)})
    assert survey("embedding", {form: LOWER_OF_16_BITS[form]}, exact)[form] == np.inf


@pytest.mark.parametrize("operator", ["linear", "sgmv", "column_linear"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_truncating_store_is_wrong_in_the_exact_tier(operator: str, dtype: str) -> None:
    """Random integers have ties and values between: the cancelling ones are all representable and do not show it."""
    emulate, out = OPERATORS[operator], FORMATS[dtype]
    wrong = 0.0
    for problem in drawn(operator, 3, seed=3, dtype=(dtype,), data=("integers",), **WIDE):
        stored = {name: out.truncate(y) for name, y in emulate(problem, Form(how="pairwise")).items()}
        wrong = max(wrong, worst(problem, stored))
    assert wrong == np.inf


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_legitimate_implementation_agrees_bit_for_bit_on_exact_data(operator: str, dtype: str) -> None:
    exact = drawn(operator, 8, seed=31, dtype=(dtype,), data=("integers", "cancelling"))
    ratios = survey(operator, LEGITIMATE, exact)
    # Of float32 the root of a norm is left to its ulps.
    most = 1.0 if (operator, dtype) == ("row_parallel_add_norm", "float32") else 0.0
    assert max(ratios.values()) <= most


def test_structured_data_are_over_the_bound_of_exchangeable_ones_only() -> None:
    """Falling magnitudes make early partial sums large: what is random in ``normal`` is the worst order in ``ramp``."""
    (normal,) = drawn("linear", 1, seed=1, dtype=("float32",), data=("normal",), **WIDE)
    (ramp,) = drawn("linear", 1, seed=1, dtype=("float32",), data=("ramp",), **WIDE)
    tight, loose = (next(iter(p.expected().values())) for p in (normal, ramp))
    assert isinstance(tight, Expected)
    assert isinstance(loose, Expected)
    relative = partial(np.median, axis=None)
    assert relative(loose.tolerance / np.abs(loose.value)) > 2 * relative(tight.tolerance / np.abs(tight.value))
