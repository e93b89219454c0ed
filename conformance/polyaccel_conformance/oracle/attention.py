"""Softmax attention and its error, first order in the errors of the scores.

With computed weights ``p_j (1 + e_j)`` the output errs by ``sum_j p_j e_j (v_j - out)``, because the weights are
divided by their own sum. Independent errors are added in quadrature, those of one sign by Cauchy and Schwarz:
``sum_j p_j |e_j| |v_j - out| <= sqrt(sum_j p_j e_j^2) sqrt(sum_j p_j (v_j - out)^2)``. The running softmax (Milakov and
Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135) adds one rounding of each running sum a tile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format
from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.primitives import ACCUMULATOR, CHUNK, drift, walk

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    visible: Mask,
    scale: float,
    *,
    p_format: Format,
    exp_ulps: int,
    divide_ulps: int,
) -> Bounded:
    """``softmax(scale * q k^T) v`` over the visible keys of each query.

    Args:
        q: ``[n, heads, head_dim]``.
        k, v: ``[m, kv_heads, head_dim]``; query head h uses key head ``h // (heads / kv_heads)``.
        visible: ``[n, m]``, which keys a query sees. A query that sees none gives zeros.
        p_format: in which the weights may be kept for their product with v.

    Returns:
        ``[n, heads, head_dim]`` before the output rounding.
    """
    n, heads, head_dim = q.shape
    kv_heads, width = k.shape[1], v.shape[2]
    if not n or not k.shape[0]:
        return Bounded.exact(np.zeros((n, heads, width)))
    group = heads // kv_heads
    # The query heads of one key head are rows of one product.
    rows = q.reshape(n, kv_heads, group, head_dim).transpose(1, 0, 2, 3).reshape(kv_heads, n * group, head_dim)
    keys, values = k.transpose(1, 2, 0), v.transpose(1, 0, 2)
    seen: Mask = np.asarray(np.repeat(visible, group, axis=0).reshape(1, n * group, visible.shape[1]))
    with np.errstate(invalid="ignore"):
        out, terms = _attend(rows, keys, values, seen, scale, p_format, exp_ulps, divide_ulps)
    sees = np.asarray(visible.any(axis=1)).reshape(n, 1, 1)
    every = bool(sees.all())

    def restore(x: Floats) -> Floats:
        x = x.reshape(kv_heads, n, group, width).transpose(1, 0, 2, 3).reshape(n, heads, width)
        return x if every else np.where(sees, x, 0.0)

    shaped = tuple((name, restore(np.broadcast_to(term, out.shape))) for name, term in terms)
    return Bounded(restore(out), np.sum([term for _, term in shaped], axis=0), shaped)


def _attend(
    q: Floats, k: Floats, v: Floats, seen: Mask, scale: float, p_format: Format, exp_ulps: int, divide_ulps: int
) -> tuple[Floats, tuple[tuple[str, Floats], ...]]:
    """``q: [kv_heads, rows, head_dim]``, ``k: [kv_heads, head_dim, m]``, ``v: [kv_heads, m, width]``."""
    head_dim = q.shape[-1]
    s = scale * (q @ k)
    squares = scale**2 * (q**2 @ k**2)
    masked = np.where(seen, s, -np.inf)
    sees = seen.any(-1, keepdims=True)
    top = np.where(sees, masked.max(-1, keepdims=True), 0.0)
    p = np.exp(masked - top)
    weight = p.sum(-1, keepdims=True)
    p = p / np.where(sees, weight, 1.0)
    out = p @ v
    spread = np.sqrt(np.maximum(p @ v**2 - out**2, 0.0))

    random = p * walk(s, squares, head_dim, s.size)
    quadrature = (random**2) @ v**2 - 2 * out * ((random**2) @ v) + out**2 * (random**2).sum(-1, keepdims=True)
    # The scale is multiplied in once; the exponent's argument is a difference of two rounded products with log2(e).
    size = np.abs(s)
    systematic = drift(s, squares, head_dim) + ACCUMULATOR * (3 * size + np.abs(top) + 2 * exp_ulps)
    error = np.sqrt(np.where(p > 0, p * systematic**2, 0.0).sum(-1, keepdims=True))
    # Terms of second order.
    slack = 1 + 2 * np.where(p > 0, systematic, 0.0).max(-1, keepdims=True)

    count = np.maximum(seen.sum(-1, keepdims=True), 1).astype(np.float64)
    sizes = p @ np.abs(v)
    contributions = p**2 @ v**2
    numerator = _accumulated(out, contributions, sizes, count, out.size)
    denominator = _accumulated(np.ones_like(top), (p**2).sum(-1, keepdims=True), np.ones_like(top), count, top.size)
    terms: tuple[tuple[str, Floats], ...] = (
        ("scores", slack * np.sqrt(np.maximum(quadrature, 0.0))),
        ("weights", slack * error * spread),
        ("sum of weighted values", numerator),
        ("sum of weights", denominator * np.abs(out)),
        ("division", (2 * divide_ulps + 1) * ACCUMULATOR * np.abs(out)),
    )
    if p_format.name != "float32":
        kept = p_format.unit * np.maximum(sizes, spread)
        lost = 0.5 * p_format.smallest * (seen @ np.abs(v))
        terms = (*terms, (f"weights kept in {p_format.name}", kept + lost))
    return out, terms


def _accumulated(total: Floats, squares: Floats, magnitudes: Floats, count: Floats, outputs: int) -> Floats:
    # Of few terms the worst case is known to be smaller: each operation loses at most a unit in the last place.
    summed = np.minimum(
        walk(total, squares, count, outputs) + drift(total, squares, count), 2 * count * ACCUMULATOR * magnitudes
    )
    tiles = np.ceil(count / CHUNK) - 1
    rescaled = tiles * ACCUMULATOR * (np.abs(total) + np.sqrt(squares))
    return np.where(count <= 1, ACCUMULATOR * magnitudes, summed + rescaled)
