"""Matrix products: aclnnMm, aclnnMatmul, aclnnAddmm, aclnnInplaceAddmm, aclnnBatchMatMul.

"Mm", "Matmul", "Addmm", "BatchMatMul" below: hicann/ops-nn matmul/mat_mul_v3/docs and matmul/batch_mat_mul_v3/docs.
Operands may be strided. Sums are kept in float32 and rounded once.
"""

from __future__ import annotations

import torch

from .descriptor import FLOATS, Tensor, broadcast, require, require_dtype, require_plain, require_rank, store, wide
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import invalid

MM = "hicann/ops-nn matmul/mat_mul_v3/docs/aclnnMm.md"
MATMUL = "hicann/ops-nn matmul/mat_mul_v3/docs/aclnnMatmul.md"
ADDMM = "hicann/ops-nn matmul/mat_mul_v3/docs/aclnnAddmm&aclnnInplaceAddmm.md"
BATCH = "hicann/ops-nn matmul/batch_mat_mul_v3/docs/aclnnBatchMatMul.md"

_KEEP, _ALLOW_DOWN, _USE_FP16, _USE_HF32, _FP32_ADD = range(5)


def _down(values: torch.Tensor, math_type: int, chip: str) -> torch.Tensor:
    """The precision loss that cubeMathType permits for float32 operands (Mm, cubeMathType, per product)."""
    if math_type == _USE_FP16 or (math_type == _ALLOW_DOWN and chip == CHIP_310P):
        return values.to(torch.float16).to(torch.float32)
    if math_type in (_ALLOW_DOWN, _USE_HF32):
        # HFLOAT32 keeps 11 explicit bits of the significand (hicann/ops-nn docs, glossary): round the lower 12 away.
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0x7FF + ((bits >> 12) & 1)) & ~0xFFF).view(torch.float32)
    return values


def _check(environment: Environment, left: Tensor, right: Tensor, out: Tensor, math_type: int) -> None:
    require(self=left, mat2=right, out=out)
    require_plain(self=left, mat2=right, out=out)
    on_310p = environment.chip == CHIP_310P
    allowed = FLOATS[:2] if on_310p else FLOATS  # Mm, note on 310P: no BFLOAT16
    for name, tensor in (("self", left), ("mat2", right), ("out", out)):
        require_dtype(name, tensor, allowed)
    pair = {left.dtype, right.dtype}
    if torch.bfloat16 in pair and len(pair) > 1:
        # Matmul, constraints on A2 and A3: no inference of BFLOAT16 with FLOAT16 or FLOAT32.
        raise invalid(f"self of {left.dtype} and mat2 of {right.dtype} have no common type on this chip.")
    common = torch.promote_types(left.dtype, right.dtype)
    if out.dtype != common and not (common == torch.float16 and out.dtype == torch.float32):
        raise invalid(f"out is {out.dtype}, but self and mat2 give {common}.")
    if math_type not in range(5):
        raise invalid(f"cubeMathType must be 0 to 4, but is {math_type}.")
    if on_310p and common == torch.float32 and math_type == _KEEP:
        raise invalid("cubeMathType 0 is not supported for FLOAT on this chip.")
    if on_310p and math_type == _USE_HF32:
        raise invalid("cubeMathType 3 is not supported on this chip.")
    if math_type == _USE_FP16 and common == torch.bfloat16:
        raise invalid("cubeMathType 2 is not supported for BFLOAT16.")
    if math_type == _USE_HF32 and common != torch.float32:
        raise invalid("cubeMathType 3 is supported for FLOAT only.")


def _operands(
    environment: Environment, left: Tensor, right: Tensor, math_type: int
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = wide(left), wide(right)
    if torch.float32 in (left.dtype, right.dtype):
        return _down(a, math_type, environment.chip), _down(b, math_type, environment.chip)
    return a, b


def _reduced_equal(left: Tensor, right: Tensor) -> None:
    inside = right.shape[-2] if len(right.shape) > 1 else right.shape[0]
    if left.shape[-1] != inside:
        raise invalid(f"The k-axis of the two inputs are different {list(left.shape)}, {list(right.shape)}.")


def _require_out(out: Tensor, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        raise invalid(f"Expected out to have shape {list(shape)}, but got {list(out.shape)}.")


@aclnn("aclnnMm", "3*tensor int8", serves="mm, npu_linear, linear of a 2-D input", document=MM)
def mm(environment: Environment, left: Tensor, right: Tensor, out: Tensor, math_type: int) -> Compute:
    """out [m, n] = left [m, k] @ right [k, n]."""
    _check(environment, left, right, out, math_type)
    require_rank("self", left, 2, 2)
    require_rank("mat2", right, 2, 2)
    _reduced_equal(left, right)
    _require_out(out, (left.shape[0], right.shape[1]))
    return lambda: store(out, torch.matmul(*_operands(environment, left, right, math_type)))


@aclnn("aclnnMatmul", "3*tensor int8", serves="matmul, linear", document=MATMUL)
def matmul(environment: Environment, left: Tensor, right: Tensor, out: Tensor, math_type: int) -> Compute:
    """The product of operands of 1 to 6 axes, batch axes broadcast."""
    _check(environment, left, right, out, math_type)
    require_rank("self", left, 1, 6)
    require_rank("mat2", right, 1, 6)
    _reduced_equal(left, right)
    rows = left.shape[-2:-1]
    columns = right.shape[-1:] if len(right.shape) > 1 else ()
    shape = (*broadcast(left.shape[:-2], right.shape[:-2]), *rows, *columns)
    if out.shape != shape and torch.Size(out.shape).numel() != torch.Size(shape).numel():
        _require_out(out, shape)

    def compute() -> None:
        store(out, torch.matmul(*_operands(environment, left, right, math_type)).reshape(out.shape))

    return compute


@aclnn("aclnnBatchMatMul", "3*tensor int8", serves="bmm", document=BATCH)
def batch_mat_mul(environment: Environment, left: Tensor, right: Tensor, out: Tensor, math_type: int) -> Compute:
    """out [b, m, n] = left [b or 1, m, k] @ right [b or 1, k, n]."""
    _check(environment, left, right, out, _KEEP if math_type in (_USE_FP16, _USE_HF32) else math_type)
    require_rank("self", left, 3, 3)
    require_rank("mat2", right, 3, 3)
    _reduced_equal(left, right)
    _require_out(out, (*broadcast(left.shape[:1], right.shape[:1]), left.shape[1], right.shape[2]))
    return lambda: store(out, torch.matmul(*_operands(environment, left, right, math_type)))


def _addmm(
    environment: Environment,
    bias: Tensor,
    left: Tensor,
    right: Tensor,
    beta: float,
    alpha: float,
    out: Tensor,
    math_type: int,
) -> Compute:
    require(self=bias)
    _check(environment, left, right, out, math_type)
    require_dtype("self", bias, FLOATS[:2] if environment.chip == CHIP_310P else FLOATS)
    require_rank("mat1", left, 2, 2)
    require_rank("mat2", right, 2, 2)
    _reduced_equal(left, right)
    shape = (left.shape[0], right.shape[1])
    require_rank("self", bias, 1, 2)
    if broadcast(bias.shape, shape) != shape:
        raise invalid(f"self of shape {list(bias.shape)} can not be broadcast to {list(shape)}.")
    _require_out(out, shape)

    def compute() -> None:
        product = torch.matmul(*_operands(environment, left, right, math_type)) * alpha
        # beta = 0 ignores self, NaN included (the page follows torch.addmm).
        store(out, product if beta == 0 else product + wide(bias) * beta)

    return compute


@aclnn("aclnnAddmm", "3*tensor 2*number tensor int8", serves="addmm, linear with a bias, npu_linear", document=ADDMM)
def addmm(
    environment: Environment,
    bias: Tensor,
    left: Tensor,
    right: Tensor,
    beta: float,
    alpha: float,
    out: Tensor,
    math_type: int,
) -> Compute:
    """out [m, n] = beta * bias + alpha * left [m, k] @ right [k, n]. bias: [n], [1, n], [m, n]."""
    return _addmm(environment, bias, left, right, beta, alpha, out, math_type)


@aclnn("aclnnInplaceAddmm", "3*tensor 2*number int8", serves="addmm_", document=ADDMM)
def inplace_addmm(
    environment: Environment, target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, math_type: int
) -> Compute:
    """target = beta * target + alpha * left @ right."""
    return _addmm(environment, target, left, right, beta, alpha, target, math_type)


OPERATORS = (mm, matmul, batch_mat_mul, addmm, inplace_addmm)
