"""MatmulAllReduce on quantised operands: A16W8 (WeightQuant), A8W8 (Quant, and V2 with scales per token).

"Weight", "Quant", "QuantV2" below: hicann/ops-transformer mc2/matmul_all_reduce/docs/, the pages
aclnnWeightQuantMatmulAllReduce.md, aclnnQuantMatmulAllReduce.md and aclnnQuantMatmulAllReduceV2.md. Integer products
are exact, scales are applied in float32, the result is rounded once.
"""

from __future__ import annotations

import torch

from .collective_rules import ALL_REDUCE_RANKS, INT_MAX, check_chip, check_modes, check_ranks, check_x2, uncontiguous
from .descriptor import (
    HALF,
    Tensor,
    is_transposed,
    require,
    require_dtype,
    require_plain,
    require_rank,
    require_same_dtype,
    require_shape,
    store,
    wide,
)
from .environment import CHIP_910B, Environment
from .operator import Launch, aclnn
from .refusal import invalid

WEIGHT = "hicann/ops-transformer mc2/matmul_all_reduce/docs/aclnnWeightQuantMatmulAllReduce.md"
QUANT = "hicann/ops-transformer mc2/matmul_all_reduce/docs/aclnnQuantMatmulAllReduce.md"
QUANT_V2 = "hicann/ops-transformer mc2/matmul_all_reduce/docs/aclnnQuantMatmulAllReduceV2.md"

_AXIS_MAX = 65535  # Weight: k and n; Quant: the last stored axis of x1 and x2
_GROUP = 32  # Weight, antiquantGroupSize: a multiple of 32 in 32..k-1


def _check_shapes(x1: Tensor, x2: Tensor, bias: Tensor | None, x3: Tensor | None, out: Tensor) -> None:
    require_rank("x1", x1, 2, 3)
    require_rank("x2", x2, 2, 2)
    require_rank("bias", bias, 1, 1)
    if 0 in x1.shape or 0 in x2.shape:
        raise invalid("x1 and x2 must not be empty tensors.")
    if x1.shape[-1] != x2.shape[0]:
        raise invalid(f"Expected k of x1 and x2 to be equal, but got {x1.shape[-1]} and {x2.shape[0]}.")
    if torch.Size(x1.shape[:-1]).numel() > INT_MAX:
        raise invalid(f"m must not exceed {INT_MAX}.")
    check_x2(x2)
    shape = (*x1.shape[:-1], x2.shape[1])
    require_shape("output", out, shape)
    require_shape("bias", bias, shape[-1:])
    require_shape("x3", x3, shape)


def _dequantised(scale: Tensor) -> torch.Tensor:
    """A scale as float32; packed ones (INT64, by npu_trans_quant_param) hold the float's bits in their low half."""
    values = scale.view()
    if values.dtype == torch.int64:
        return (values & 0xFFFFFFFF).to(torch.int64).to(torch.int32).view(torch.float32)
    return values.to(torch.float32)


@aclnn(
    "aclnnWeightQuantMatmulAllReduce",
    "6*tensor 2*string 3*int64 tensor",
    serves="npu_mm_all_reduce_base (A16W8)",
    document=WEIGHT,
    since="8.0.RC2",
    collective=True,
)
def weight_quant_matmul_all_reduce(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    x3: Tensor | None,
    group: str,
    reduce_op: str,
    comm_turn: int,
    stream_mode: int,
    group_size: int,
    out: Tensor,
) -> Launch:
    """out = sum over ranks of (x1 @ ((x2 + offset) * scale) + bias + x3); x2 INT8."""
    function = "aclnnWeightQuantMatmulAllReduce"
    check_chip(environment, function, (CHIP_910B,))
    require(x1=x1, x2=x2, antiquantScale=scale, output=out)
    require_plain(x1=x1, output=out)
    require_dtype("x1", x1, HALF)
    require_dtype("x2", x2, (torch.int8,))
    require_same_dtype(x1=x1, antiquantScale=scale, antiquantOffset=offset, bias=bias, x3=x3, output=out)
    check_modes(reduce_op or "", comm_turn, stream_mode)
    _check_shapes(x1, x2, bias, x3, out)
    k, n = x2.shape
    if max(k, n) > _AXIS_MAX:
        raise invalid(f"k {k} and n {n} must be in [1, {_AXIS_MAX}].")
    if group_size and (group_size % _GROUP or not _GROUP <= group_size <= min(k - 1, INT_MAX)):
        raise invalid(f"antiquantGroupSize must be 0 or a multiple of {_GROUP} in [{_GROUP}, {k - 1}]: {group_size}.")
    allowed = [(-(-k // group_size), n)] if group_size else [(1,), (n,), (1, n)]
    if scale.shape not in allowed:
        raise invalid(f"antiquantScale must have one of the shapes {allowed}, but has {list(scale.shape)}.")
    require_shape("antiquantOffset", offset, scale.shape)
    communicator = environment.communicator(function, group)
    check_ranks(function, communicator, ALL_REDUCE_RANKS)
    environment.claim_fused(function, communicator)

    def per_row(values: Tensor) -> torch.Tensor:
        spread = wide(values)
        return spread.repeat_interleave(group_size, 0)[:k] if group_size else spread

    def compute() -> None:
        weight = x2.view().to(torch.float32)
        if offset is not None:
            weight = weight + per_row(offset)
        partial = wide(x1) @ (weight * per_row(scale))
        for addend in (bias, x3):
            if addend is not None:
                partial = partial + wide(addend)
        store(out, communicator.all_reduce(partial))

    return Launch(uncontiguous("MatmulAllReduce", x1=x1, bias=bias, x3=x3), compute)


def _quant(
    function: str,
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    x3: Tensor | None,
    scale: Tensor,
    per_token: Tensor | None,
    group: str,
    reduce_op: str,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
) -> Launch:
    check_chip(environment, function, (CHIP_910B,))
    require(x1=x1, x2=x2, dequantScale=scale, output=out)
    require_plain(x1=x1, output=out)
    for name, tensor in (("x1", x1), ("x2", x2)):
        require_dtype(name, tensor, (torch.int8,))
    require_dtype("bias", bias, (torch.int32,))
    require_dtype("output", out, HALF)
    require_same_dtype(output=out, x3=x3)
    require_dtype("pertokenScale", per_token, (torch.float32,))
    if out.dtype == torch.bfloat16:
        scales: tuple[torch.dtype, ...] = (torch.bfloat16,)
    else:
        # QuantV2: FLOAT32 only beside a per-token scale; without one it goes through npu_trans_quant_param.
        scales = (torch.float32,) if per_token is not None else (torch.int64, torch.uint64)
    require_dtype("dequantScale", scale, scales)
    check_modes(reduce_op or "", comm_turn, stream_mode)
    _check_shapes(x1, x2, bias, x3, out)
    k, n = x2.shape
    if max(k, k if is_transposed(x2) else n) > _AXIS_MAX:
        raise invalid(f"the last axis of x1 and of x2 must not exceed {_AXIS_MAX}: {k}, {n}.")
    if scale.shape not in ((1,), (n,), (1, n)):
        raise invalid(f"dequantScale must have shape [1], [{n}] or [1, {n}], but has {list(scale.shape)}.")
    rows = torch.Size(x1.shape[:-1]).numel()
    require_shape("pertokenScale", per_token, (rows,))
    communicator = environment.communicator(function, group)
    check_ranks(function, communicator, ALL_REDUCE_RANKS)
    environment.claim_fused(function, communicator)

    def compute() -> None:
        # In float64 every sum of products of two int8 is exact.
        partial = x1.view().to(torch.float64) @ x2.view().to(torch.float64)
        if bias is not None:
            partial = partial + bias.view()
        result = partial.to(torch.float32) * _dequantised(scale)
        if per_token is not None:
            result = result * per_token.view().view(*x1.shape[:-1], 1)
        if x3 is not None:
            result = result + wide(x3)
        store(out, communicator.all_reduce(result))

    strided = {"x1": x1, "bias": bias, "x3": x3, "dequant_scale": scale, "pertoken_scale": per_token}
    return Launch(uncontiguous("MatmulAllReduce", **strided), compute)


@aclnn(
    "aclnnQuantMatmulAllReduce",
    "5*tensor 2*string 2*int64 tensor",
    serves="npu_mm_all_reduce_base (A8W8)",
    document=QUANT,
    since="8.0.RC2",
    collective=True,
)
def quant_matmul_all_reduce(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    x3: Tensor | None,
    scale: Tensor,
    group: str,
    reduce_op: str,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
) -> Launch:
    """out = sum over ranks of ((x1 @ x2 + bias) * scale + x3); x1, x2 INT8, bias INT32."""
    function = "aclnnQuantMatmulAllReduce"
    rest = (group, reduce_op, comm_turn, stream_mode, out)
    return _quant(function, environment, x1, x2, bias, x3, scale, None, *rest)


@aclnn(
    "aclnnQuantMatmulAllReduceV2",
    "6*tensor 2*string 2*int64 tensor",
    serves="npu_mm_all_reduce_base (A8W8 with pertoken_scale)",
    document=QUANT_V2,
    since="8.0.RC3",
    collective=True,
)
def quant_matmul_all_reduce_v2(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    x3: Tensor | None,
    scale: Tensor,
    per_token: Tensor | None,
    group: str,
    reduce_op: str,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
) -> Launch:
    """The same, times a scale for each row of x1."""
    function = "aclnnQuantMatmulAllReduceV2"
    rest = (group, reduce_op, comm_turn, stream_mode, out)
    return _quant(function, environment, x1, x2, bias, x3, scale, per_token, *rest)


OPERATORS = (weight_quant_matmul_all_reduce, quant_matmul_all_reduce, quant_matmul_all_reduce_v2)
