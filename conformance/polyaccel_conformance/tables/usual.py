"""What tables share: how an entry is made, what kernels usually do not promise, and which cases they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from polyaccel.backend import Query
from polyaccel.backend.support import Supports
from polyaccel_conformance.promises import Kernel, NotPromised

DENSE = NotPromised(
    checks=("layout.arguments",),
    causes=("copies * uncounted",),
    reason="works on dense rows: a strided operand is copied first, by the kernel's wrapper or the mapping, which no "
    "ledger counts",
)
UNCHECKED = NotPromised(
    checks=("errors.arguments",),
    causes=("*: accepted", "*: untyped error"),
    reason="operands are not checked, or by bare assertions: another dtype or width gives whatever is read, or "
    "an error of no type of the contract",
)
ONE_ROW = NotPromised(
    checks=("invariance.batch",),
    reason="the same bits for a row alone and in a batch are not stated: Triton compiles another kernel for one row",
)
TRITON_EXP = NotPromised(
    checks=("values.bound",),
    causes=("wrong value",),
    axes="dtype=float32",
    # exp(-x) is 2^y with y = -x log2(e) rounded to float32: a relative error of |x| 2^-24 with |x| below 88, where the
    # tolerance is at least 10 x 2^-24.
    at_most=8.8,
    reason="no accuracy of exp is stated: Triton's is 2^y of a rounded y, so that its relative error grows with |x|",
)


def anything(query: Query) -> list[str]:
    """Refuses nothing."""
    return []


def tanh_only(query: Query) -> list[str]:
    """Reasons why a GELU by tanh alone cannot answer."""
    return [] if query.static.get("approximate") == "tanh" else ["only the approximation by tanh"]


def whole_heads(query: Query) -> list[str]:
    """Reasons why a rotation of whole heads cannot answer."""
    head, rotary = query.integer("head_dim"), query.integer("rotary_dim")
    return [] if head == rotary else [f"rotates whole heads of {head}, not {rotary} dimensions"]


def kernel(
    fn: Callable[..., object],
    mapping: str,
    *not_promised: NotPromised,
    distribution: str,
    usual: Sequence[NotPromised],
    supports: Supports = anything,
) -> Kernel:
    """An entry; ``usual``: what none of the table's kernels promises, beside its own ``not_promised``."""
    known = (*usual, *not_promised)
    return Kernel(fn, supports=supports, distribution=distribution, mapping=mapping, not_promised=known)


def dense_copy(x: torch.Tensor) -> torch.Tensor:
    """Dense memory of its own, for kernels that work in place."""
    return x.clone(memory_format=torch.contiguous_format)
