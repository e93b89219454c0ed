"""One tile of keys in a running softmax (arXiv 2205.14135), for decode and prefill alike."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(q, keys, values, where, mask, seen, scale, top, weight, acc):
    """``(top, weight, acc)`` after a tile: the largest score of each query so far, its sum of exponentials, its sum of
    values.

    ``q: [queries, head_dim]``; ``where, mask: [keys, head_dim]``, which elements of keys and values are read; ``seen``
    (broadcast to ``[queries, keys]``), which keys a query sees.
    """
    k = tl.load(keys + where, mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen no key so far must not subtract minus infinity from itself.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp(scores - base[:, None])
    fade = tl.exp(top - base)
    weight = weight * fade + tl.sum(p, 1)
    v = tl.load(values + where, mask=mask, other=0.0)
    acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, weight, acc
