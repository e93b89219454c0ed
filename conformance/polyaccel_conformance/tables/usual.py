"""What kernels written for one model's forward pass usually do not promise."""

from __future__ import annotations

from polyaccel_conformance.promises import NotPromised

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
