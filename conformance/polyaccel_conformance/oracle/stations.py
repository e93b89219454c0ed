"""Stations as compositions of their parts.

Parts round their results to the activations' dtype, a fused form may keep float32 between them: the bound holds for
every mixture, because each result between two parts is allowed its rounding and none is required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format
from polyaccel_conformance.oracle.bounded import Bounded, cast, coarser
from polyaccel_conformance.oracle.functions import silu
from polyaccel_conformance.oracle.gemm import linear
from polyaccel_conformance.oracle.lora import Adapter, Triples, sgmv
from polyaccel_conformance.oracle.norm import rms_norm
from polyaccel_conformance.oracle.primitives import Order, add, multiply
from polyaccel_conformance.oracle.rotary import rotate

Floats = npt.NDArray[np.float64]
Style = Literal["half", "interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """A weight with a step's adapters on it.

    Attributes:
        weight: ``[n, k]``; bias: ``[n]``.
        adapters: by slot; triples: of the rows.
        starts: first column of each slice, and the end.
    """

    weight: Floats
    bias: Floats | None
    adapters: Mapping[int, Adapter]
    triples: Triples
    starts: tuple[int, ...]


def joined(
    x: Floats, weight: Floats, bias: Floats | None, kept: Format, order: Order = "random", addend: Floats | None = None
) -> Bounded:
    """linear plus ``addend: [T, n]``, before the last rounding: a term of its sum, or added to the rounded product."""
    base = linear(x, weight, bias, order, addend)
    if addend is None or order == "exact":
        return base
    return cast(base.at(base.value - addend), kept, "product").at(base.value)


def column_linear(
    x: Floats, projection: Projection, kept: Format, order: Order = "random", addend: Floats | None = None
) -> Bounded:
    """linear (plus ``addend: [T, n]``) and sgmv, before the last rounding: ``[T, n]``."""
    base = joined(x, projection.weight, projection.bias, kept, order, addend)
    if not len(projection.triples.rows):
        return base
    y, touched = sgmv(
        base if order == "exact" else cast(base, kept, "base"),
        x,
        projection.adapters,
        projection.triples,
        projection.starts,
        kept,
        order,
    )
    return y if order == "exact" else _where(touched, y, base)


def between(y: Bounded, kept: Format, order: Order) -> Bounded:
    """What one part hands to the next."""
    return y if order == "exact" else cast(y, kept, "between parts")


def gate_up_act(
    y: Bounded, kept: Format, silu_kept: Format, *, exp_ulps: int, divide_ulps: int, order: Order = "random"
) -> Bounded:
    """``silu(gate) * up`` for ``y = [gate, up]: [T, 2 n]`` as :func:`column_linear` gives it."""
    n = y.shape[1] // 2
    y = between(y, kept, order)
    gate, up = y[:, :n], y[:, n:]
    activated = silu(gate, exp_ulps, divide_ulps)
    if silu_kept.name != "float32":
        activated = cast(activated, silu_kept, "silu")
    return multiply(activated, up)


def turned_heads(
    y: Bounded,
    cos: Floats,
    sin: Floats,
    style: Style,
    kept: Format,
    norm: tuple[Floats, float, Format, int] | None,
    order: Order = "random",
) -> Bounded:
    """Heads of q or k, ``y: [T, heads, head_dim]``, normed where asked for and turned.

    Args:
        cos, sin: ``[T, rotary_dim / 2]``.
        norm: weight ``[head_dim]``, eps, the format in which the normed may be kept, and the ulps of rsqrt.
    """
    y = between(y, kept, order)
    if norm is not None:
        weight, eps, normed, ulps = norm
        y = between(rms_norm(y, weight, eps, normed=normed, rsqrt_ulps=ulps), kept, order)
    turned = rotate(y.value, cos, sin, style)
    width = 2 * cos.shape[1]
    if order == "exact" or not width:
        return Bounded.exact(turned.value) if order == "exact" else y
    carried = _turned_bound(y.bound, np.abs(cos), np.abs(sin), style)
    result = Bounded(turned.value, np.zeros_like(turned.value)).plus("before the rotation", carried)
    slack = np.where(np.abs(turned.value) > 0, 2.0**-23 * carried, 0.0)
    return result.plus("rotation", turned.bound + slack)


def add_norm(
    y: Bounded,
    joined: Bounded,
    residual: Floats,
    weight: Floats,
    eps: float,
    kept: Format,
    normed: Format,
    rsqrt_ulps: int,
    order: Order = "random",
) -> tuple[Bounded, Bounded]:
    """``(normed, s)`` with ``s = y + residual``, both before their last rounding: ``[T, n]``.

    ``joined``: the same sum with the residual as a term of the product, as where an accumulator starts with it.
    """
    if order == "exact":
        s = Bounded.exact(y.value + residual)
        return rms_norm(s, weight, eps, normed=normed, rsqrt_ulps=rsqrt_ulps, exact_sum=True), s
    s = coarser(add(between(y, kept, order), Bounded.exact(residual)), joined)
    return rms_norm(cast(s, kept, "sum"), weight, eps, normed=normed, rsqrt_ulps=rsqrt_ulps), s


def _where(mask: npt.NDArray[np.bool_], a: Bounded, b: Bounded) -> Bounded:
    """Elements of ``a`` where the mask is set, of ``b`` elsewhere."""
    if mask.all():
        return a
    terms = [(name, np.where(mask, term, 0.0)) for name, term in a.terms]
    terms += [(name, np.where(mask, 0.0, term)) for name, term in b.terms]
    return Bounded(np.where(mask, a.value, b.value), np.where(mask, a.bound, b.bound), tuple(terms))


def _turned_bound(bound: Floats, cos: Floats, sin: Floats, style: Style) -> Floats:
    width = cos.shape[1]
    first = slice(0, width) if style == "half" else slice(0, 2 * width, 2)
    second = slice(width, 2 * width) if style == "half" else slice(1, 2 * width, 2)
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = bound[..., first], bound[..., second]
    carried = bound.copy()
    carried[..., first], carried[..., second] = c * a + s * b, c * b + s * a
    return carried
