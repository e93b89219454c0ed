"""``sample``: one program a row, which reads the row from device memory once and then from the caches.

Nothing is sorted. Top-k and top-p each keep the ids above some score and the first few of those equal to it; that score
is found bit by bit, by counts and by sums of masses above a trial one. Sums are float32, in an order that depends on
the vocabulary alone: a row's id is the same in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.delta import exp

BLOCK, WARPS = 4096, 32
ADJUSTED_BLOCK = 1024
PARAMETERS = 7
"""Columns of the table: temperature, top_k, top_p, min_p, and the repetition, presence and frequency penalty."""
COLUMNS = tl.constexpr(PARAMETERS)
LOWEST = tl.constexpr(-3.4028234663852886e38)
HIGHEST = tl.constexpr(3.4028234663852886e38)
NOWHERE = tl.constexpr(2147483647)
# Float32 scores that were 16 bits differ in their upper bits alone.
KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}


@triton.jit
def _scores(scores, index, vocabulary, RAW: tl.constexpr):
    """Of ``index``: NaN as minus infinity, which the lowest finite number stands for; truly infinite if masked, or
    beyond the vocabulary."""
    inside = index < vocabulary
    s = tl.load(scores + index, mask=inside, other=0.0).to(tl.float32)
    if RAW:
        s = tl.where(s != s, LOWEST, s)
        s = tl.minimum(tl.maximum(s, LOWEST), HIGHEST)
    # Zeros of either sign are equal.
    return tl.where(inside, tl.where(s == 0.0, 0.0, s), float("-inf"))


@triton.jit
def adjust_scores_kernel(
    logits,
    logits_stride,
    scores,
    vocabulary,
    slots,
    parameters,
    counts,
    prompts,
    bias,
    allowed,
    PENALTIES: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocabulary
    slot = tl.load(slots + row).to(tl.int64)
    s = _scores(logits + row * logits_stride, index, vocabulary, True)
    lowest = s <= LOWEST
    wide = slot * vocabulary + index
    own = parameters + slot * COLUMNS
    if PENALTIES:
        count = tl.load(counts + wide, mask=inside, other=0)
        produced = count > 0
        penalty = tl.zeros_like(s) + tl.load(own + 4)
        seen = (produced | (tl.load(prompts + wide, mask=inside, other=0) != 0)) & (penalty != 1.0)
        penalised = tl.where(s > 0, tl.div_rn(s, penalty), s * penalty)
        s = tl.where(seen, penalised, s)
        s -= tl.load(own + 5) * produced.to(tl.float32)
        s -= tl.load(own + 6) * count.to(tl.float32)
    if BIAS:
        s += tl.load(bias + wide, mask=inside, other=0.0)
    # What stands for minus infinity stays so whatever a penalty or a bias made of it.
    s = tl.where(lowest, LOWEST, tl.minimum(tl.maximum(s, LOWEST), HIGHEST))
    if MASK:
        s = tl.where(tl.load(allowed + wide, mask=inside, other=0) != 0, s, float("-inf"))
    tl.store(scores + row * vocabulary + index, s, mask=inside)


@triton.jit
def _mass(s, top, temperature):
    """Relative to the largest score's, which is exactly 1."""
    mass = exp(tl.div_rn(s - top, tl.zeros_like(s) + temperature))
    return tl.where(s > LOWEST, mass, 0.0)


@triton.jit
def _key(s, BITS: tl.constexpr):
    """Integers in the order of the scores."""
    bits = s.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - BITS)


@triton.jit
def _weight(s, index, vocabulary, top, temperature, COUNTED: tl.constexpr):
    if COUNTED:
        return tl.where(index < vocabulary, 1.0, 0.0)
    return _mass(s, top, temperature)


@triton.jit
def _above(
    scores, vocabulary, top, temperature, v, COUNTED: tl.constexpr, RAW: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many ids, or how much mass, have a key above v."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        s = _scores(scores, index, vocabulary, RAW)
        acc += tl.where(_key(s, BITS) > v, _weight(s, index, vocabulary, top, temperature, COUNTED), 0.0)
    return tl.sum(acc, 0)


@triton.jit
def _above_three(
    scores, vocabulary, top, temperature, v, step, COUNTED: tl.constexpr, RAW: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """:func:`_above` of ``v``, ``v + step`` and ``v + 2 step``."""
    one = tl.zeros((BLOCK,), tl.float32)
    two = tl.zeros((BLOCK,), tl.float32)
    three = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        s = _scores(scores, index, vocabulary, RAW)
        key, weight = _key(s, BITS), _weight(s, index, vocabulary, top, temperature, COUNTED)
        one += tl.where(key > v, weight, 0.0)
        two += tl.where(key > v + step, weight, 0.0)
        three += tl.where(key > v + 2 * step, weight, 0.0)
    return tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)


@triton.jit
def _threshold(
    scores, vocabulary, top, temperature, bound, COUNTED: tl.constexpr, RAW: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest key above which there is less than ``bound``: the key of an id, or the smallest of all."""
    v = tl.full((), 0, tl.int32)
    if _above(scores, vocabulary, top, temperature, v - 1, COUNTED, RAW, BITS, BLOCK) < bound:
        v += -(1 << (BITS - 1))
    if BITS % 2 == 0:
        half: tl.constexpr = 1 << (BITS - 2)
        if _above(scores, vocabulary, top, temperature, v + (half - 1), COUNTED, RAW, BITS, BLOCK) >= bound:
            v += half
    for i in range((BITS - 1) // 2):
        step = tl.full((), 1, tl.int32) << (2 * ((BITS - 1) // 2 - 1 - i))
        one, two, three = _above_three(
            scores, vocabulary, top, temperature, v + step - 1, step, COUNTED, RAW, BITS, BLOCK
        )
        passed = (one >= bound).to(tl.int32) + (two >= bound).to(tl.int32) + (three >= bound).to(tl.int32)
        v += passed * step
    return v


@triton.jit
def _mass_at(scores, vocabulary, top, temperature, v, RAW: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of an id whose key is v."""
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        s = _scores(scores, start + tl.arange(0, BLOCK), vocabulary, RAW)
        most = tl.maximum(most, tl.where(_key(s, BITS) == v, _mass(s, top, temperature), 0.0))
    return tl.max(most, 0)


@triton.jit
def _filters(
    scores, vocabulary, top, temperature, top_k, top_p, RAW: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The key above which top-k and then top-p keep all ids, and how many of those at it, lowest first."""
    v = tl.full((), 0, tl.int32) + -(1 << (BITS - 1))
    ties = tl.full((), 0, tl.int32) + NOWHERE
    limited = (top_k > 0.0) & (top_k < vocabulary)
    if limited:
        v = _threshold(scores, vocabulary, top, temperature, top_k, True, RAW, BITS, BLOCK)
        more = _above(scores, vocabulary, top, temperature, v, True, RAW, BITS, BLOCK)
        ties = (top_k - more).to(tl.int32)
    if top_p < 1.0:
        total = _above(scores, vocabulary, top, temperature, v, False, RAW, BITS, BLOCK)
        if limited:
            total += ties.to(tl.float32) * _mass_at(scores, vocabulary, top, temperature, v, RAW, BITS, BLOCK)
        bound = top_p * total
        found = _threshold(scores, vocabulary, top, temperature, bound, False, RAW, BITS, BLOCK)
        before = _above(scores, vocabulary, top, temperature, found, False, RAW, BITS, BLOCK)
        mass = _mass_at(scores, vocabulary, top, temperature, found, RAW, BITS, BLOCK)
        # The j-th of them is kept if what is before it, that is before + j * mass, is less than the bound.
        room = tl.div_rn(bound - before, tl.where(mass > 0.0, mass, 1.0))
        own = tl.where(mass > 0.0, tl.minimum(tl.maximum(tl.ceil(room), 1.0), 1e9), 1e9).to(tl.int32)
        ties = tl.where(found == v, tl.minimum(ties, own), own)
        v = found
    return v, ties


@triton.jit
def _kept(
    scores, start, vocabulary, top, temperature, v, ties, met, min_p, ORDERING: tl.constexpr, RAW: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Masses of a block of ids, 0 of those that are filtered out; and how many ids at v there were up to its end."""
    s = _scores(scores, start + tl.arange(0, BLOCK), vocabulary, RAW)
    mass = _mass(s, top, temperature)
    if ORDERING:
        key = _key(s, BITS)
        equal = (key == v).to(tl.int32)
        place = met + tl.cumsum(equal, 0) - equal
        mass = tl.where((key > v) | ((key == v) & (place < ties)), mass, 0.0)
        met += tl.sum(equal, 0)
    return tl.where(mass >= min_p, mass, 0.0), met


@triton.jit
def _draw(
    scores, vocabulary, top, greedy, own, uniform, ORDERING: tl.constexpr, RAW: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first id, of those kept, up to which there is more than ``uniform`` of all their mass."""
    lane = tl.arange(0, BLOCK)
    temperature, min_p = tl.load(own), tl.load(own + 3)
    top = tl.maximum(top, LOWEST)
    v = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    if ORDERING:
        v, ties = _filters(
            scores, vocabulary, top, temperature, tl.load(own + 1), tl.load(own + 2), RAW, BITS, BLOCK
        )  # fmt: skip
    met = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    last = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        mass, met = _kept(scores, start, vocabulary, top, temperature, v, ties, met, min_p, ORDERING, RAW, BITS, BLOCK)
        total += tl.sum(mass, 0)
        last = tl.where(mass > 0.0, start + lane, last)
    target = uniform * total
    # Where the target was rounded up to the total: the last id with any mass.
    drawn = tl.max(last, 0)
    met = tl.full((), 0, tl.int32)
    prefix = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        if prefix <= target:
            mass, met = _kept(
                scores, start, vocabulary, top, temperature, v, ties, met, min_p, ORDERING, RAW, BITS, BLOCK
            )
            before = prefix
            prefix += tl.sum(mass, 0)
            if prefix > target:
                reached = (before + tl.cumsum(mass, 0) > target) & (mass > 0.0)
                first = tl.min(tl.where(reached, start + lane, NOWHERE), 0)
                # A running sum may end below the sum, which is made in another order.
                end = tl.max(tl.where(mass > 0.0, start + lane, 0), 0)
                drawn = tl.minimum(first, end)
    return tl.where(total > 0.0, drawn, greedy)


@triton.jit
def sample_kernel(
    scores,
    scores_stride,
    vocabulary,
    slots,
    parameters,
    uniforms,
    ids,
    last_tokens,
    counts,
    SAMPLING: tl.constexpr,
    ORDERING: tl.constexpr,
    COUNTS: tl.constexpr,
    RAW: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    scores += row * scores_stride
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = lane
    for start in range(0, vocabulary, BLOCK):
        s = _scores(scores, start + lane, vocabulary, RAW)
        at = tl.where(s > best, start + lane, at)
        best = tl.maximum(s, best)
    top = tl.max(best, 0)
    found = tl.min(tl.where(best == top, at, NOWHERE), 0)
    if SAMPLING:
        own = parameters + slot * COLUMNS
        if tl.load(own) != 0.0:
            found = _draw(
                scores, vocabulary, top, found, own, tl.load(uniforms + row), ORDERING, RAW, BITS, BLOCK
            )  # fmt: skip
    tl.store(ids + row, found.to(tl.int64))
    tl.store(last_tokens + slot, found.to(tl.int64))
    if COUNTS:
        # Integers: in any order.
        tl.atomic_add(counts + slot * vocabulary + found, 1)


@triton.jit
def top_scores_kernel(
    scores, scores_stride, vocabulary, ids, shifted, masses, top_ids, top_shifted, columns, width,
    RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores less the largest, of the sampled id and of the largest ones in order; and the sum of their masses."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * scores_stride
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        best = tl.maximum(best, _scores(scores, start + lane, vocabulary, RAW))
    top = tl.maximum(tl.max(best, 0), LOWEST)
    acc = tl.zeros((BLOCK,), tl.float32)
    sampled = tl.full((BLOCK,), float("-inf"), tl.float32)
    chosen = tl.load(ids + row).to(tl.int32)
    for start in range(0, vocabulary, BLOCK):
        s = _scores(scores, start + lane, vocabulary, RAW)
        acc += _mass(s, top, 1.0)
        sampled = tl.maximum(sampled, tl.where(start + lane == chosen, s, float("-inf")))
    tl.store(masses + row, tl.sum(acc, 0))
    own = tl.max(sampled, 0)
    tl.store(shifted + row, tl.where(own > LOWEST, own - top, float("-inf")))
    score = tl.full((), float("inf"), tl.float32)
    index = tl.full((), -1, tl.int32)
    for i in range(columns):
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        at = tl.full((BLOCK,), 0, tl.int32) + NOWHERE
        for start in range(0, vocabulary, BLOCK):
            s = _scores(scores, start + lane, vocabulary, RAW)
            after = (start + lane < vocabulary) & ((s < score) | ((s == score) & (start + lane > index)))
            better = after & ((s > best) | (at == NOWHERE))
            best, at = tl.where(better, s, best), tl.where(better, start + lane, at)
        score = tl.max(best, 0)
        index = tl.min(tl.where(best == score, at, NOWHERE), 0)
        tl.store(top_ids + row * width + i, index.to(tl.int64))
        tl.store(top_shifted + row * width + i, tl.where(score > LOWEST, score - top, float("-inf")))
