"""Rotary embedding: aclnnRotaryPositionEmbedding, aclnnApplyRotaryPosEmb and its V2.

"Embedding" below: hicann/ops-transformer posembedding/rotary_position_embedding/docs/aclnnRotaryPositionEmbedding.md;
"Apply": Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-apply_rotary_pos_emb.md (matches torch_npu 2.13);
"Mul": the same folder's torch_npu-npu_rotary_mul.md.
"""

from __future__ import annotations

import torch

from .descriptor import (
    FLOATS,
    Tensor,
    require,
    require_dtype,
    require_plain,
    require_rank,
    require_same_dtype,
    require_shape,
    store,
    wide,
)
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import NotSimulated, invalid

EMBEDDING = "hicann/ops-transformer posembedding/rotary_position_embedding/docs/aclnnRotaryPositionEmbedding.md"
APPLY = "Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-apply_rotary_pos_emb.md"

_HALF, _INTERLEAVE = 0, 1
_MAX_D = 896  # Embedding, A2 and A3: D < 896 and even
_MAX_BN = 1000  # Embedding, half: B and N < 1000; interleave: B * N < 1000
_BSND, _TND = 1, 4  # the codes op-plugin hands on (ApplyRotaryPosEmbNpuOpApi.cpp)
_APPLY_D = (64, 128)  # Apply, on everything before the 950


def _rotate(values: torch.Tensor, interleave: bool) -> torch.Tensor:
    if interleave:
        return torch.stack((-values[..., 1::2], values[..., 0::2]), -1).flatten(-2)
    low, high = values.chunk(2, -1)
    return torch.cat((-high, low), -1)


def _rotated(x: Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    values = wide(x)
    return values * cos + _rotate(values, interleave) * sin


def _table_fits(x: tuple[int, ...], table: tuple[int, ...], interleave: bool) -> bool:
    """Whether cos of this shape is one of the page's forms of x.

    4-D half: 11SD, B1SD, BNSD (BNSD); 1S1D, BS1D, BSND (BSND); S11D, SB1D, SBND (SBND); interleave: only the first of
    each. The page does not tell the layouts apart, so a form of any of them passes. 3-D (Mul): T1D, TND.
    """
    if len(x) == 3:
        return table == (x[0], 1, x[2]) or (not interleave and table == x)
    a, b, c, d = x
    forms = {(1, 1, c, d), (1, b, 1, d), (a, 1, 1, d)}
    if not interleave:
        forms |= {(a, 1, c, d), (a, b, 1, d), (a, b, c, d)}
    return table in forms


def _check_embedding(environment: Environment, x: Tensor, cos: Tensor, sin: Tensor, mode: int, out: Tensor) -> None:
    require(x=x, cos=cos, sin=sin, out=out)
    if environment.chip == CHIP_310P:
        # op-plugin takes the legacy kernel below Ascend910B1 (RotaryMulKernelNpuOpApi.cpp).
        raise invalid("RotaryPositionEmbedding is not supported on this chip.")
    require_plain(x=x, cos=cos, sin=sin)
    require_dtype("x", x, FLOATS)
    require_same_dtype(x=x, cos=cos, sin=sin, out=out)
    require_rank("x", x, 3, 4)
    require_shape("out", out, x.shape)
    if mode not in (_HALF, _INTERLEAVE):
        raise invalid(f"mode {mode} is not supported on this chip, only 0 (half) and 1 (interleave) are.")
    if 0 in x.shape:
        return  # Embedding: an empty x gives an empty result, free of the rules on shapes
    require_shape("sin", sin, cos.shape)
    width = x.shape[-1]
    if width >= _MAX_D or width % 2:
        raise invalid(f"D must be even and less than {_MAX_D}, but is {width}.")
    if not _table_fits(x.shape, cos.shape, mode == _INTERLEAVE):
        raise invalid(f"cos of shape {list(cos.shape)} does not fit x of shape {list(x.shape)} in mode {mode}.")
    if len(x.shape) == 4:
        # Which axes are B and N depends on a layout that the function is not told: the axes that cos has as 1, or, in
        # full form, none, say which may be batch and heads. The first axis is B or S, the second and third hold N.
        batch, heads = x.shape[0], x.shape[1] if cos.shape[1] == 1 else x.shape[2]
        sequence_first = cos.shape[0] != 1 and cos.shape[1] == 1 and cos.shape[2] == 1
        if sequence_first:
            batch, heads = x.shape[1], x.shape[2]
        too_many = batch * heads >= _MAX_BN if mode == _INTERLEAVE else max(batch, heads) >= _MAX_BN
        if too_many:
            raise invalid(f"B {batch} and N {heads} exceed the limit of {_MAX_BN} in mode {mode}.")


@aclnn("aclnnRotaryPositionEmbedding", "3*tensor int64 tensor", serves="npu_rotary_mul", document=EMBEDDING)
def rotary_position_embedding(
    environment: Environment, x: Tensor, cos: Tensor, sin: Tensor, mode: int, out: Tensor
) -> Compute:
    """x * cos + rotate(x) * sin. x: [B, N, S, D], [B, S, N, D], [S, B, N, D] or [T, N, D]; cos, sin broadcast."""
    _check_embedding(environment, x, cos, sin, mode, out)
    require_rank("x", x, 4, 4)  # Embedding: four axes; TND came with V2 (Mul)
    return lambda: store(out, _rotated(x, wide(cos), wide(sin), mode == _INTERLEAVE))


def _check_apply(environment: Environment, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: int) -> None:
    require(queryRef=query, keyRef=key, cos=cos, sin=sin)
    # Apply, constraints: one data type for all; no BFLOAT16 on 310P; layouts BSND and TND only before the 950.
    require_dtype("queryRef", query, FLOATS[:2] if environment.chip == CHIP_310P else FLOATS)
    require_same_dtype(queryRef=query, keyRef=key, cos=cos, sin=sin)
    if layout not in (_BSND, _TND):
        raise invalid(f"layout {layout} is not supported on this chip, only 1 (BSND) and 4 (TND) are.")
    axes = 3 if layout == _TND else 4
    for name, tensor in (("queryRef", query), ("keyRef", key), ("cos", cos), ("sin", sin)):
        require_rank(name, tensor, axes, axes)
        if 0 in tensor.shape:
            raise invalid(f"{name} must not be empty, but its shape is {list(tensor.shape)}.")
    lead = query.shape[: axes - 2]
    width = query.shape[-1]
    if key.shape[: axes - 2] != lead or key.shape[-1] != width:
        raise invalid(f"queryRef {list(query.shape)} and keyRef {list(key.shape)} may differ in N only.")
    if width not in _APPLY_D:
        raise invalid(f"D must be 64 or 128, but is {width}.")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[: axes - 2] != lead or table.shape[-2] != 1:
            raise invalid(f"{name} must have shape {[*lead, 1, width]}, but has {list(table.shape)}.")
        if table.shape[-1] not in _APPLY_D or table.shape[-1] > width:
            raise invalid(f"D of {name} must be 64 or 128 and at most {width}, but is {table.shape[-1]}.")
    require_shape("sin", sin, cos.shape)


def _apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Compute:
    width = cos.shape[-1]

    def compute() -> None:
        for target in (query, key):
            values = target.view()
            part = values[..., :width].to(torch.float32)
            rotated = part * wide(cos) + _rotate(part, interleave=False) * wide(sin)
            values[..., :width] = rotated.to(values.dtype)

    return compute


@aclnn("aclnnApplyRotaryPosEmb", "4*tensor int64", serves="npu_apply_rotary_pos_emb", document=APPLY)
def apply_rotary_pos_emb(
    environment: Environment, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: int
) -> Compute:
    """Rotate query and key in place, halves. query: [B, S, N, D] or [T, N, D]; cos, sin: [B, S, 1, D] or [T, 1, D]."""
    _check_apply(environment, query, key, cos, sin, layout)
    return _apply(query, key, cos, sin)


@aclnn("aclnnApplyRotaryPosEmbV2", "4*tensor int64 string", serves="npu_apply_rotary_pos_emb", document=APPLY)
def apply_rotary_pos_emb_v2(
    environment: Environment, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: int, mode: str
) -> Compute:
    """The same with a named mode: before the 950 only "half"."""
    _check_apply(environment, query, key, cos, sin, layout)
    if mode not in ("half", "interleave", "quarter"):
        raise invalid(f"rotaryMode {mode!r} is not one of half, interleave, quarter.")
    if mode != "half":
        raise invalid(f"rotaryMode {mode!r} is not supported on this chip, only half is.")
    return _apply(query, key, cos, sin)


@aclnn(
    "aclnnRotaryPositionEmbeddingV2",
    "3*tensor int64 2*tensor",
    serves="npu_rotary_mul",
    document="Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_rotary_mul.md",
    since="8.5.0",
)
def rotary_position_embedding_v2(
    environment: Environment, x: Tensor, cos: Tensor, sin: Tensor, mode: int, rotate: Tensor | None, out: Tensor
) -> Compute:
    """V1 with an optional rotation matrix, which is not simulated."""
    _check_embedding(environment, x, cos, sin, mode, out)
    if rotate is not None:
        raise NotSimulated("aclnnRotaryPositionEmbeddingV2", "the rotation matrix")
    return lambda: store(out, _rotated(x, wide(cos), wide(sin), mode == _INTERLEAVE))


OPERATORS = (
    rotary_position_embedding,
    rotary_position_embedding_v2,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_v2,
)
