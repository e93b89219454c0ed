"""Sums of attention: scores q k^T, weights and their product with v.

Scores are read off two keys: with values of 1 and -1, ``tanh(scale (s_1 - s_2) / 2)`` comes out. With q = 0 every
weight is the same, and the output is the sum of the values over their number, a power of two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Choice
from polyaccel_conformance.harness.probes import Measured, Sum, leading, measure, relative_bits
from polyaccel_conformance.probes.planted import LENGTH, plain, run, stored
from polyaccel_conformance.problems.attention import DenseAttentionProblem, PagedAttentionProblem
from polyaccel_conformance.problems.attention_data import Keys

Floats = npt.NDArray[np.float64]
Attend = Callable[[Floats, Floats, Floats, float], Floats]
"""From ``q: [sequences, head_dim]``, ``k, v: [sequences, keys, head_dim]`` and the scale, the output of each q."""

SCALE = 0.125
UNITS = 16
"""Units of a score: ``tanh(scale units / 2)`` is still far from one."""
NEAR = 0.3
"""Of a unit, what rounding to 16 bits may be off in a score that is read."""
SCORE_REACH = 14
"""Bits of a score that count: beyond them the contract's exponential may lose them."""
WEIGHT_REACH = 18
"""Bits of a weight that count: the others are left to the ulps of the exponential and the roundings of its argument."""
HEAD_DIM = 64


def dense_attention(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Of segments, every token of one a query."""
    return _measured(dtype, [lambda *given: _dense(bench, dtype, *given)])


def paged_attention(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Of decode steps and of whole prompts, which may be different kernels."""

    def form(phase: str) -> Attend:
        return lambda *given: _paged(bench, dtype, phase, *given)

    return _measured(dtype, [form("decode"), form("prefill")])


def _measured(dtype: str, forms: list[Attend]) -> tuple[Measured, ...]:
    def attend(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
        found = [form(q, k, v, scale) for form in forms]
        same = np.all([np.isclose(found[0], one, rtol=2.0**-7, atol=0) for one in found], axis=0)
        return np.where(same, found[0], np.nan)

    def scores(q: Floats, key: Floats, scale: float = SCALE) -> Floats:
        return _difference(attend, q, key, np.zeros_like(key), scale)

    units = (2.0**-9 if dtype == "float16" else 1.0, 1.0)
    found = (
        measure(dtype, Sum(name="q k", k=HEAD_DIM, evaluate=scores, counted=True, most=UNITS)),
        _kept_scores(attend),
        measure(
            dtype,
            Sum(name="p v", k=LENGTH, evaluate=lambda v, _: _weighted(forms, v), both=False, units=units),
        ),
    )
    return (*found, _weights(attend)) if dtype == "float32" else found


def _difference(attend: Attend, q: Floats, first: Floats, second: Floats, scale: float) -> Floats:
    """``q (first - second)`` for rows ``[rows, head_dim]``, to the nearest integer if it is near one."""
    v = np.zeros((len(q), 2, q.shape[1]))
    v[:, 0], v[:, 1] = 1, -1
    out = attend(q, np.stack([first, second], axis=1), v, scale)[:, 0]
    with np.errstate(all="ignore"):
        read = 2 * np.arctanh(out) / scale
        nearest = np.rint(read)
        return np.where(np.abs(read - nearest) < NEAR, nearest, read)


def _kept_scores(attend: Attend) -> Measured:
    """Scores of ``2^s + 1`` and ``2^s``: their difference is lost where they are kept in fewer bits than s."""
    exponents = np.arange(1, SCORE_REACH)
    q, first, second = np.zeros((3, len(exponents), HEAD_DIM))
    half = exponents // 2
    q[:, 0], q[:, 1] = 2.0 ** (exponents - half), 1
    first[:, 0] = second[:, 0] = 2.0**half
    first[:, 1] = 1
    right = _difference(attend, q, first, second, 1.0) == 1
    return Measured(name="q k", quantity="scores", bits=1 + leading(right), reach=SCORE_REACH)


def _weighted(forms: list[Attend], v: Floats) -> Floats:
    """Sums over the keys of ``v: [rows, keys]``, a row in each dimension of a head."""
    rows, keys = v.shape
    sequences = -(-rows // HEAD_DIM)
    values = np.zeros((sequences * HEAD_DIM, keys))
    values[:rows] = v
    stacked = values.reshape(sequences, HEAD_DIM, keys).transpose(0, 2, 1)
    q = np.zeros((sequences, HEAD_DIM))
    found = [form(q, np.ones_like(stacked), stacked, SCALE).reshape(-1)[:rows] * keys for form in forms]
    return np.where(np.all([one == found[0] for one in found], axis=0), found[0], np.nan)


def _weights(attend: Attend) -> Measured:
    """Weights of two keys, each read off a dimension of its own. The smaller one is not divided by itself."""
    drops = np.arange(1, 25) / 8 + 1 / 1024
    q, first, second = np.zeros((3, len(drops), HEAD_DIM))
    q[:, 0], second[:, 0] = drops, -1
    v = np.zeros((len(drops), 2, HEAD_DIM))
    v[:, 0, 0] = v[:, 1, 1] = 1
    out = attend(q, np.stack([first, second], axis=1), v, 1.0)
    wanted = 1 / (1 + np.exp(np.stack([-drops, drops], axis=1)))
    bits = min(relative_bits(out[:, :2], wanted), WEIGHT_REACH)
    return Measured(name="p", quantity="arithmetic", bits=bits, reach=WEIGHT_REACH)


# -- placing -----------------------------------------------------------------------------------------------------------


def _sizes(scale: float) -> dict[str, Choice]:
    return {
        "dims.kv_heads": 1,
        "dims.group": 1,
        "dims.head_dim": HEAD_DIM,
        "attributes.scale": scale,
        "structure.unread": "nan",
    }


def _dense(bench: Bench, dtype: str, q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    count, keys, width = k.shape
    axes: dict[str, Choice] = {**_sizes(scale), "dims.tokens": 1}
    problem = DenseAttentionProblem(
        plain("dense_attention", dtype, {**axes, "attributes.starts": "one", "attributes.causal": False})
    )
    problem.case = problem.case.with_(dims__tokens=count * keys)
    problem.starts = [i * keys for i in range(count + 1)]
    values = {"q": np.repeat(q[:, None], keys, axis=1), "k": k, "v": v}
    problem.operands = {name: stored(x.reshape(-1, 1, width), dtype) for name, x in values.items()}
    found: Floats = run(bench, problem, "out").reshape(count, keys, width)[:, 0]
    return found


def _paged(bench: Bench, dtype: str, phase: str, q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    count, keys, width = k.shape
    axes: dict[str, Choice] = {**_sizes(scale), "dims.sequences": 1, "dims.context": 1, "attributes.window": None}
    problem = PagedAttentionProblem(
        plain(
            "paged_attention",
            dtype,
            {**axes, "attributes.layer": 0, "structure.phase": phase, "structure.blocks": "ascending"},
        )
    )
    queries = 1 if phase == "decode" else keys
    problem.counts, problem.contexts = [queries] * count, [keys] * count
    none = np.zeros((keys, 1), dtype=np.int64)
    problem.sequences = [Keys(k=k[i, :, None], v=v[i, :, None], codes=none, places=none[:0, 0]) for i in range(count)]
    problem.visible = [np.ones((queries, keys), dtype=np.bool_) for _ in range(count)]
    problem.operands = {"q": stored(np.repeat(q[:, None], queries, axis=1).reshape(-1, 1, width), dtype)}
    found: Floats = run(bench, problem, "out")[queries - 1 :: queries, 0]
    return found
