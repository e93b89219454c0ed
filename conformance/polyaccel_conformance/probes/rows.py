"""Statistics of the norms, tables of the rotation, and the arithmetic of activations, routing and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.harness.probes import Measured, leading, relative_bits
from polyaccel_conformance.oracle.functions import erf_values
from polyaccel_conformance.probes.planted import plain, run, source, station_axes, stored
from polyaccel_conformance.problems.activation import GeluProblem, SiluAndMulProblem
from polyaccel_conformance.problems.moe_route import MoeRouteProblem
from polyaccel_conformance.problems.norm import LayerNormProblem, RmsNormProblem
from polyaccel_conformance.problems.rotary import RotaryProblem
from polyaccel_conformance.problems.sample import SampleProblem
from polyaccel_conformance.problems.stations_norm import RowParallelAddNormProblem
from polyaccel_conformance.problems.weights import HostWeight

Floats = npt.NDArray[np.float64]

HIDDEN = 512
LARGE = 128
"""Large elements of a row of statistics; the others are one."""
STATISTIC_REACH = 16
"""Bits that a float32 sum of a row keeps of a large element's square in any order: all of them are below 2^9."""
ARITHMETIC_REACH = 18
"""Bits that every float32 form has: the contract's ulps and a few roundings take less than six."""
EPS = 2.0**-20

# -- norms -------------------------------------------------------------------------------------------------------------


def rms_norm(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """The mean of squares."""

    def normed(x: Floats) -> Floats:
        problem = RmsNormProblem(plain("rms_norm", dtype, {**_norm_axes(len(x)), "structure.residual": False}))
        problem.operands = {"x": stored(x, dtype), "weight": stored(np.ones(HIDDEN), dtype)}
        return run(bench, problem, "normed")

    return (statistic(dtype, normed, balanced=False),)


def layer_norm(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """The variance; the mean is zero, and so is every sum of the rows."""

    def normed(x: Floats) -> Floats:
        problem = LayerNormProblem(plain("layer_norm", dtype, {**_norm_axes(len(x)), "structure.bias": False}))
        problem.operands = {"x": stored(x, dtype), "weight": stored(np.ones(HIDDEN), dtype)}
        return run(bench, problem, "y")

    return (statistic(dtype, normed, balanced=True),)


def add_norm(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """The mean of squares in ``row_parallel_add_norm``: of the residual, with a weight of zeros."""

    def normed(x: Floats) -> Floats:
        axes = station_axes(len(x), 1, {"dims.n": HIDDEN, "attributes.eps": EPS})
        problem = RowParallelAddNormProblem(plain("row_parallel_add_norm", dtype, axes))
        problem.weight = HostWeight(matrix=stored(np.zeros((HIDDEN, 1)), dtype), slices=(HIDDEN,))
        problem.operands = {
            "x": stored(np.zeros((len(x), 1)), dtype),
            "residual": stored(x, dtype),
            "norm_weight": stored(np.ones(HIDDEN), dtype),
        }
        return run(bench, problem, "normed")

    return (statistic(dtype, normed, balanced=False),)


def _norm_axes(rows: int) -> dict[str, Choice]:
    return {
        "dims.tokens": rows,
        "dims.hidden": HIDDEN,
        "attributes.eps": EPS,
        "structure.heads": False,
        "alias": "none",
    }


def statistic(dtype: str, normed: Callable[[Floats], Floats], *, balanced: bool) -> Measured:
    """Rows of large elements of about 2^(s/2) among ones, in random order: whether the ones count.

    The large elements' results are compared with those of the whole row and of a row whose ones were lost. In 16 bits
    one of them could not tell, all together can: their significands differ, and so do their distances to the next
    rounding boundary. Where too few do, nothing more can be read.
    """
    out = format_of(dtype)
    exponents = np.arange(2, STATISTIC_REACH, 2)
    x = np.stack([_row(int(s), balanced) for s in exponents])
    large = np.abs(x) > 1
    whole = np.mean(x**2, axis=1, keepdims=True) + EPS
    lost = np.mean(np.where(large, x**2, 0.0), axis=1, keepdims=True) + EPS
    with np.errstate(invalid="ignore"):
        right, wrong = out.round(x / np.sqrt(whole)), out.round(x / np.sqrt(lost))
        got = normed(x)
        off = np.abs(got - right)
        nearer = (off < np.abs(got - wrong)) & (off <= np.abs(right - wrong))
    told = large & (right != wrong)
    known = leading(told.sum(axis=1) >= 3)
    counted = (nearer & told).sum(axis=1) * 2 > told.sum(axis=1)
    reach = int(exponents[known - 1]) + 1
    return Measured(name="mean of squares", quantity="statistic", bits=1 + 2 * leading(counted[:known]), reach=reach)


def _row(s: int, balanced: bool) -> Floats:
    """``[HIDDEN]``: large elements of different significands, each once with either sign where ``balanced``."""
    steps = np.arange(LARGE) // (2 if balanced else 1)
    values = np.ones(HIDDEN)
    values[:LARGE] = 2.0 ** (s // 2) * (1 + steps / LARGE)
    signs = 1.0 - 2.0 * (np.arange(HIDDEN) % 2)
    return (values * signs)[source().permutation(f"row {s}", HIDDEN)]


# -- activations -------------------------------------------------------------------------------------------------------


def silu_and_mul(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Bits of gate and up where silu is its argument; in float32 those of the exponential and the division."""

    def act(gate: Floats, up: Floats) -> Floats:
        axes: dict[str, Choice] = {"dims.tokens": 1, "dims.n": len(gate)}
        problem = SiluAndMulProblem(plain("silu_and_mul", dtype, axes))
        problem.operands = {"x": stored(np.concatenate([gate, up])[None], dtype)}
        return run(bench, problem, "y").reshape(-1)

    probes = _significands(dtype)
    ones = np.ones_like(probes)
    bits = min(leading(act(32 * probes, ones) == 32 * probes), leading(act(32 * ones, probes) == 32 * probes))
    gate = _interior(dtype, -6.0, 6.0)
    return _with_arithmetic(dtype, 1 + bits, lambda: relative_bits(act(gate, np.ones_like(gate)), _silu(gate)))


def gelu(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Bits of x where GELU is its argument; in float32 those of erf, for positive arguments, whose sum does not
    cancel."""

    def act(x: Floats) -> Floats:
        axes: dict[str, Choice] = {"dims.tokens": 1, "dims.n": len(x), "attributes.approximate": "none"}
        problem = GeluProblem(plain("gelu", dtype, axes))
        problem.operands = {"x": stored(x[None], dtype)}
        return run(bench, problem, "y").reshape(-1)

    probes = _significands(dtype)
    x = _interior(dtype, 0.25, 4.0)
    wanted = x / 2 * (1 + erf_values(x * np.sqrt(0.5)))
    bits = 1 + leading(act(16 * probes) == 16 * probes)
    return _with_arithmetic(dtype, bits, lambda: relative_bits(act(x), wanted))


def _significands(dtype: str) -> Floats:
    """``1 + 2^-s`` for every s that the dtype holds."""
    bits = format_of(dtype).bits
    found: Floats = 1 + np.ldexp(np.ones(bits - 1), -np.arange(1, bits))
    return found


def _interior(dtype: str, low: float, high: float) -> Floats:
    return format_of(dtype).round(low + (high - low) * source().uniform("interior", (200,)))


def _silu(x: Floats) -> Floats:
    found: Floats = x / (1 + np.exp(-x))
    return found


def _with_arithmetic(dtype: str, input_bits: int, arithmetic: Callable[[], int]) -> tuple[Measured, ...]:
    """16-bit results hide the arithmetic behind their own rounding."""
    if dtype != "float32":
        return (Measured(input_bits=input_bits),)
    bits = min(arithmetic(), ARITHMETIC_REACH)
    return (Measured(input_bits=input_bits, quantity="arithmetic", bits=bits, reach=ARITHMETIC_REACH),)


# -- rotation ----------------------------------------------------------------------------------------------------------


def rotary_embedding(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Bits of q, turned by nothing, and of the tables: ``2^s (1 + 2^-s) - 2^s`` is one in every format."""
    probes = _significands(dtype)
    straight = _turned(bench, dtype, np.stack([probes, probes], axis=1), np.ones_like(probes), np.zeros_like(probes))
    reach = 16 if dtype == "float16" else 24
    large = np.ldexp(np.ones(reach - 1), np.arange(1, reach))
    x = np.repeat(large[:, None], 2, axis=1)
    first = _turned(bench, dtype, x, 1 + 1 / large, np.ones_like(large))[:, 0]
    second = _turned(bench, dtype, x, np.ones_like(large), -1 - 1 / large)[:, 1]
    bits = 1 + min(leading(first == 1), leading(second == -1))
    return (
        Measured(
            input_bits=1 + leading(np.all(straight == probes[:, None], axis=1)),
            quantity="tables",
            bits=bits,
            reach=reach,
        ),
    )


def _turned(bench: Bench, dtype: str, q: Floats, cos: Floats, sin: Floats) -> Floats:
    """One head of two elements a token, ``q: [tokens, 2]``; ``cos, sin: [tokens]``."""
    tokens = len(q)
    axes: dict[str, Choice] = {
        "dims.tokens": tokens,
        "dims.heads": 1,
        "dims.kv_heads": 1,
        "dims.head_dim": 2,
        "dims.rotary_dim": 2,
        "attributes.style": "half",
        "structure.positions": "sequential",
        "structure.decode": False,
    }
    problem = RotaryProblem(plain("rotary_embedding", dtype, axes))
    problem.positions = np.arange(tokens, dtype=np.int64)
    problem.cos, problem.sin = stored(cos[:, None], "float32"), stored(sin[:, None], "float32")
    problem.operands = {"q": stored(q[:, None], dtype), "k": stored(np.zeros((tokens, 1, 2)), dtype)}
    return run(bench, problem, "q")[:, 0]


# -- float32 results ---------------------------------------------------------------------------------------------------


def moe_route(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Bits of softmax weights, which are float32 whatever the logits are."""
    experts = 16
    axes: dict[str, Choice] = {
        "dims.tokens": 8,
        "dims.experts": experts,
        "dims.top_k": experts,
        "attributes.scoring": "softmax_topk",
        "attributes.renormalise": False,
        "attributes.groups": 1,
        "attributes.topk_groups": 1,
        "attributes.scale": 1.0,
        "structure.bias": "none",
    }
    problem = MoeRouteProblem(plain("moe_route", dtype, axes))
    logits = np.sort(problem.operands["logits"].values.astype(np.float64), axis=1)[:, ::-1]
    mass = np.exp(logits - logits[:, :1])
    got = run(bench, problem, "weights")
    bits = min(relative_bits(got, mass / mass.sum(axis=1, keepdims=True)), ARITHMETIC_REACH)
    return (Measured(quantity="arithmetic", bits=bits, reach=ARITHMETIC_REACH),)


def sample(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Bits of log-probabilities, which are float32 whatever the logits are."""
    top, rows = 20, 4
    axes: dict[str, Choice] = {
        "dims.rows": rows,
        "dims.vocabulary": 64,
        "dims.spare": 0,
        "dims.top": top,
        "dims.steps": 0,
        "attributes.temperature": 1.0,
        "attributes.top_k": 0,
        "attributes.top_p": 1.0,
        "attributes.min_p": 0.0,
        "attributes.repetition_penalty": 1.0,
        "attributes.presence_penalty": 0.0,
        "attributes.frequency_penalty": 0.0,
        "attributes.logprobs": top,
        "structure.bias": "none",
        "structure.mask": "none",
        "structure.forbidden": "none",
        "structure.history": "none",
        "structure.rows": "same",
        "structure.slots": "order",
        "structure.reused": False,
        "structure.alone": False,
    }
    problem = SampleProblem(plain("sample", dtype, axes))
    logits = problem.operands["logits"].values.astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    got = run(bench, problem, "logprobs")
    falling = np.sort(wanted, axis=1)[:, ::-1][:, :top]
    bits = min(relative_bits(got[:, 2 + top :], falling), ARITHMETIC_REACH)
    return (Measured(quantity="arithmetic", bits=bits, reach=ARITHMETIC_REACH),)
