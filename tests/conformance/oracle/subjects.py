"""Every numeric operator with implementations of it: legitimate ones, and ones of a precision class lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.case import Choice
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.problems.sample import SampleProblem
from tests.conformance import emulated
from tests.conformance.drawn import Emulation, Ratio, bound_ratio, problem_set, problems, survey
from tests.conformance.emulated import LEGITIMATE, Form
from tests.conformance.emulated_activation import GELU, SILU, emulated_gelu, emulated_silu
from tests.conformance.emulated_attention import ACCUMULATIONS, FORMS, Emulated
from tests.conformance.emulated_collectives import REDUCTIONS, Reduction, chain, four_bits
from tests.conformance.emulated_moe import EXPERTS, ROUTES, emulated_experts, emulated_route
from tests.conformance.emulated_norm import (
    LAYER_LEGITIMATE,
    RMS_LEGITIMATE,
    emulated_layer_norm,
    emulated_rms_norm,
)
from tests.conformance.emulated_rotary import LEGITIMATE as ROTARY
from tests.conformance.emulated_rotary import emulated as emulated_rotary
from tests.conformance.emulated_sampling import SAMPLERS, Sampler
from tests.conformance.emulation import BF16, F16, LOWER, tf32

Floats = npt.NDArray[np.float64]
Axes = Mapping[str, tuple[Choice, ...]]

NOTHING: Axes = MappingProxyType({})


def sample_ratio(problem: Problem, emulate: Emulation) -> float:
    """Worst err / tol of the log-probabilities; infinite for an id that is not accepted."""
    assert isinstance(problem, SampleProblem)
    assert isinstance(emulate, Sampler)
    found = 0.0
    for distribution, request in zip(problem.distributions, problem.requests, strict=True):
        if not distribution.candidates.any():
            continue
        chosen = distribution.choose(request.uniform)
        if chosen.clear and emulate.choose(distribution.row, request.uniform) not in chosen.ids:
            return np.inf
        expected = SampleProblem.logprobs(distribution)
        off = np.abs(emulate.logprobs(distribution.row) - expected.value) / expected.tolerance
        found = max(found, float(off[distribution.candidates].max()))
    return found


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One operator.

    Attributes:
        legitimate: implementations that the contract permits.
        lower: by dtype, implementations one precision class lower.
        sizes: axes of the survey, small enough for thousands of cases.
        random: axes on which the bound is compared with lower implementations; ``where``: others for single ones.
        exact: axes of the exact tier.
        ratio: of one problem and one implementation, err / tol.
    """

    operator: str
    legitimate: Mapping[str, Emulation]
    lower: Mapping[str, Mapping[str, Emulation]]
    sizes: Axes = field(default_factory=dict)
    random: Axes = field(default_factory=dict)
    exact: Axes = field(default_factory=dict)
    where: Mapping[str, Axes] = field(default_factory=dict)
    ratio: Ratio = bound_ratio

    def drawn(self, count: int, seed: int, **axes: tuple[Choice, ...]) -> Iterator[Problem]:
        """Problems of the axes of the survey, those named from ``axes``; names that the operator lacks are dropped."""
        cases = problem_set(self.operator)
        known = {*cases.axes(), *(("ranks",) if self.operator not in PROBLEM_SETS else ())}
        named = {path: values for path, values in {**self.sizes, **axes}.items() if path.replace("__", ".") in known}
        return problems(cases, count, seed, **named)

    def worst(self, emulations: Mapping[str, Emulation], found: Iterator[Problem]) -> dict[str, float]:
        """The worst err / tol of each implementation."""
        return survey(emulations, found, self.ratio)

    def healthy(self, dtype: str, count: int, seed: int) -> float:
        """The worst err / tol of all legitimate implementations on random data of the survey's sizes."""
        random = self.drawn(count, seed, dtype=(dtype,), data=("normal",))
        return max(self.worst(self.legitimate, random).values())

    def bounded(self, dtype: str, name: str, seed: int) -> float:
        """What tier 2 makes of a lower implementation: its worst err / tol on random data."""
        axes = {**self.random, **self.where.get(name, NOTHING), "dtype": (dtype,)}
        return self.worst({name: self.lower[dtype][name]}, self.drawn(3, seed, **axes))[name]

    def discovered(self, dtype: str, name: str, seed: int) -> bool:
        """Whether tier 1 finds it: some exact case has a wrong bit."""
        axes = {**self.exact, "dtype": (dtype,)}
        return self.worst({name: self.lower[dtype][name]}, self.drawn(6, seed, **axes))[name] > 1


# -- products, adapters, stations --------------------------------------------------------------------------------------

PRODUCTS: Mapping[str, Callable[[Problem, Form], Mapping[str, Floats]]] = {
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


def two_parts(x: npt.ArrayLike) -> Floats:
    """A float32 operand as the sum of two bfloat16 ones: 16 bits."""
    high = BF16.round(x)
    return high + BF16.round(np.asarray(x) - high)


LOWER_OF_FLOAT32: Mapping[str, Form] = {
    "float16 accumulator": Form(how="float16 accumulator"),
    "bfloat16 accumulator": Form(how="bfloat16 accumulator"),
    "split-K partials in bfloat16": Form(how="bfloat16 split-K"),
    "13-bit truncating accumulator": Form(how="13-bit truncating"),
    "TF32 operands": Form(how="pairwise", inputs=tf32),
    "operands of three bfloat16 parts, two kept": Form(how="pairwise", inputs=two_parts),
}
LOWER_OF_H: Mapping[str, Form] = {
    "h in float16": Form(how="pairwise", h="float16"),
    "h in bfloat16": Form(how="pairwise", h="bfloat16"),
}
LOWER_OF_16_BITS: Mapping[str, Form] = {
    "bfloat16 accumulator": Form(how="bfloat16 accumulator", h="x"),
    "split-K partials in bfloat16": Form(how="bfloat16 split-K", h="x"),
    "float16 accumulator": Form(how="float16 accumulator", h="x"),
}
SMALL: Axes = {
    "dims__tokens": (1, 2, 5),
    "dims__k": (1, 2, 7, 16, 33, 64),
    "dims__n": (1, 2, 7, 17, 33),
    "dims__rank": (1, 2, 8, 17, 33),
}
WIDE: Axes = {
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


def _product(operator: str) -> Subject:
    emulate = PRODUCTS[operator]

    def every(forms: Mapping[str, Form]) -> dict[str, Emulation]:
        return {name: partial(emulate, form=form) for name, form in forms.items()}

    has_h = operator not in ("linear", "sgmv_expand", "embedding")
    half = dict(LOWER_OF_16_BITS)
    if operator == "embedding":
        # A lookup has only the sum over the rank.
        half.pop("split-K partials in bfloat16")
    wide = {**WIDE, "dims__rank": (128,)} if operator == "embedding" else WIDE
    return Subject(
        operator=operator,
        legitimate=every(LEGITIMATE),
        lower={
            "float32": every({**LOWER_OF_FLOAT32, **(LOWER_OF_H if has_h else {})}),
            "float16": every(half),
            "bfloat16": every(half),
        },
        sizes=SMALL,
        random={**WIDE, "data": ("normal",)},
        exact={**wide, "data": ("cancelling",)},
    )


# -- rows --------------------------------------------------------------------------------------------------------------

ROW_SIZES: Axes = {"dims__hidden": (1, 2, 7, 16, 17, 33, 64, 129, 256), "dims__tokens": (1, 2, 7)}


def _norm(operator: str, legitimate: Mapping[str, Emulation], emulate: Callable[..., Mapping[str, Floats]]) -> Subject:
    float16 = partial(emulate, how="float16 accumulator", statistics=F16.round)
    bfloat16 = partial(emulate, how="bfloat16 accumulator", statistics=BF16.round)
    return Subject(
        operator=operator,
        legitimate=legitimate,
        lower={
            "float32": {"float16 statistics": float16, "bfloat16 statistics": bfloat16},
            "float16": {"float16 statistics": float16, "bfloat16 statistics": bfloat16},
            "bfloat16": {"float16 statistics": float16, "bfloat16 statistics": bfloat16},
        },
        sizes=ROW_SIZES,
        random={"data": ("normal",), "dims__hidden": (256,), "dims__tokens": (33,)},
        exact={
            "data": ("integers",),
            "dims__hidden": (1023,),
            "dims__tokens": (7,),
            "structure__residual": (False,),
        },
    )


def _activation(
    operator: str, legitimate: Mapping[str, Emulation], emulate: Callable[..., Mapping[str, Floats]]
) -> Subject:
    float16, bfloat16 = partial(emulate, step=F16.round), partial(emulate, step=BF16.round)
    return Subject(
        operator=operator,
        legitimate=legitimate,
        lower={
            "float32": {"float16 arithmetic": float16, "bfloat16 arithmetic": bfloat16},
            "float16": {"float16 arithmetic": float16, "bfloat16 arithmetic": bfloat16},
            "bfloat16": {"bfloat16 arithmetic": bfloat16},
        },
        sizes={"dims__n": (1, 7, 64, 129), "dims__tokens": (1, 2, 7)},
        random={"data": ("normal",), "dims__n": (256,), "dims__tokens": (16,)},
        exact={"data": ("saturated",), "dims__n": (64,)},
    )


def _rotary() -> Subject:
    forms = {
        "{} arithmetic": lambda to: partial(emulated_rotary, step=to),
        "{} tables": lambda to: partial(emulated_rotary, table=to),
    }
    classes = {"float32": (F16, BF16), "float16": (F16, BF16), "bfloat16": (BF16,)}
    return Subject(
        operator="rotary_embedding",
        legitimate=ROTARY,
        lower={
            dtype: {name.format(to.name): make(to.round) for to in lower for name, make in forms.items()}
            for dtype, lower in classes.items()
        },
        sizes={"dims__head_dim": (2, 7, 33, 64), "dims__tokens": (1, 2, 7)},
        random={
            "data": ("normal",),
            "dims__head_dim": (128,),
            "dims__rotary_dim": (64,),
            "dims__tokens": (33,),
        },
        exact={"data": ("integers",), "dims__head_dim": (128,), "dims__rotary_dim": (64,)},
    )


# -- attention ---------------------------------------------------------------------------------------------------------

PEAKED = ("16-bit scores", "16-bit accumulators")


def _attention(operator: str) -> Subject:
    longest = "dims__tokens" if operator == "dense_attention" else "dims__context"
    half = {
        "float16": {
            "16-bit scores": Emulated("pairwise", scores=F16.round),
            "16-bit accumulators": Emulated("float16 accumulator"),
        },
        "bfloat16": {
            "16-bit scores": Emulated("pairwise", scores=BF16.round),
            "16-bit accumulators": Emulated("bfloat16 accumulator"),
            "16-bit sum of weights": Emulated("pairwise", sums=BF16.round),
        },
    }
    one: dict[str, tuple[Choice, ...]] = {
        "dims__kv_heads": (1,),
        "dims__group": (1,),
        "dims__sequences": (1,),
        "dims__head_dim": (64,),
        longest: (65,),
        "attributes__starts": ("one",),
        "attributes__scale": (0.3,),
        "attributes__causal": (False,),
        "attributes__window": (None,),
        "structure__phase": ("prefill",),
    }
    return Subject(
        operator=operator,
        legitimate={**ACCUMULATIONS, **FORMS},
        lower={
            "float32": {
                "TF32 scores": Emulated("pairwise", operands=tf32),
                "P in bfloat16": Emulated("pairwise", p="bfloat16"),
                "P in float16": Emulated("pairwise", p="float16"),
                "float16 scores": Emulated("pairwise", scores=F16.round),
                "exp in bfloat16": Emulated("pairwise", weights=BF16.round),
                "bfloat16 accumulators": Emulated("bfloat16 accumulator"),
            },
            **half,
        },
        sizes={
            longest: (1, 2, 16, 17, 33),
            "dims__kv_heads": (1, 2),
            "dims__group": (1, 2),
            "dims__sequences": (1, 2),
            "dims__head_dim": (11, 33, 64),
        },
        random={**one, "data": ("normal",)},
        where={
            **{name: {"data": ("peaked",)} for name in PEAKED},
            "16-bit sum of weights": {"data": ("positive",), longest: (130,), "structure__phase": ("chunked",)},
        },
        exact={**one, "data": ("selection",)},
    )


# -- experts and sampling ----------------------------------------------------------------------------------------------


def _route() -> Subject:
    lower = {
        name: partial(emulated_route, how="sequential", to=to)
        for name, to in (
            ("bfloat16 arithmetic", BF16.round),
            ("float16 arithmetic", F16.round),
            ("11-bit arithmetic", tf32),
        )
    }
    return Subject(
        operator="moe_route",
        legitimate=ROUTES,
        lower=dict.fromkeys(FORMATS, lower),
        sizes={"dims__tokens": (1, 2, 7)},
        random={"data": ("normal",), "dims__tokens": (7, 17)},
        exact={"data": ("levels", "tied")},
    )


def _experts() -> Subject:
    return Subject(
        operator="moe_experts",
        legitimate=EXPERTS,
        lower={
            "float32": {
                "float16 arithmetic": partial(emulated_experts, how="sequential", to=F16.round),
                "bfloat16 arithmetic": partial(emulated_experts, how="sequential", to=BF16.round),
                "TF32 operands": partial(emulated_experts, how="sequential", operands=tf32),
            },
            **{dtype: {how: partial(emulated_experts, how=how) for how in LOWER} for dtype in ("float16", "bfloat16")},
        },
        sizes={"dims__tokens": (1, 2, 3), "dims__hidden": (8, 33), "dims__experts": (1, 2, 3)},
        random={
            "data": ("normal",),
            "dims__tokens": (3, 5),
            "dims__hidden": (33, 64),
            "structure__quantised": (False,),
        },
        exact={
            "data": ("cancelling",),
            "dims__tokens": (1, 2, 3),
            "dims__hidden": (33, 64),
            "dims__experts": (1, 2, 3),
            "structure__quantised": (False,),
        },
    )


def _sample() -> Subject:
    lower: Mapping[str, Emulation] = {
        "bfloat16 arithmetic": Sampler(to=BF16.round),
        "float16 arithmetic": Sampler(to=F16.round),
    }
    return Subject(
        operator="sample",
        legitimate=SAMPLERS,
        lower=dict.fromkeys(FORMATS, lower),
        sizes={"dims__rows": (1, 3), "dims__vocabulary": (2, 17, 33, 64), "structure__alone": (False,)},
        random={"data": ("normal",), "dims__rows": (8,), "dims__vocabulary": (64, 257)},
        exact={"data": ("dyadic",), "dims__rows": (8,)},
        ratio=sample_ratio,
    )


def _reduction(operator: str) -> Subject:
    return Subject(
        operator=operator,
        legitimate=REDUCTIONS,
        lower={
            "float32": {
                "partial sums in float16": Reduction(chain, F16.round),
                "partial sums in bfloat16": Reduction(chain, BF16.round),
            },
            "float16": {"partial sums in bfloat16": Reduction(chain, BF16.round)},
            "bfloat16": {"partial sums of four bits": Reduction(chain, four_bits)},
        },
        sizes={"ranks": (2, 3, 4, 8), "dims__rows": (1, 2, 7), "structure__scenario": ("plain",)},
        random={"ranks": (4,), "dims__rows": (7,), "dims__width": (64,), "data": ("normal",)},
        exact={"ranks": (4,), "dims__rows": (7,), "dims__width": (64,), "data": ("digits",)},
    )


SUBJECTS: Mapping[str, Subject] = MappingProxyType(
    {
        subject.operator: subject
        for subject in (
            *(_product(operator) for operator in PRODUCTS),
            _norm("rms_norm", RMS_LEGITIMATE, emulated_rms_norm),
            _norm("layer_norm", LAYER_LEGITIMATE, emulated_layer_norm),
            _activation("silu_and_mul", SILU, emulated_silu),
            _activation("gelu", GELU, emulated_gelu),
            _rotary(),
            _attention("dense_attention"),
            _attention("paged_attention"),
            _route(),
            _experts(),
            _sample(),
            _reduction("all_reduce"),
            _reduction("reduce_scatter"),
        )
    }
)
