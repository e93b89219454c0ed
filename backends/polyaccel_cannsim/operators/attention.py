"""Attention: aclnnFusedInferAttentionScoreV2 / V3, aclnnIncreFlashAttentionV4, aclnnPromptFlashAttentionV3.

"FusedInfer" below: Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md, which
matches torch_npu 2.13; the C page hicann/ops-transformer attention/fused_infer_attention_score/docs/
aclnnFusedInferAttentionScoreV3.md (2025-11) is the same but narrower for TND (bfloat16 only, no block table). "Incre",
"Prompt": the same folders' pages of npu_incre_flash_attention and npu_prompt_flash_attention.

Simulated: float16 and bfloat16, layouts BSH, BSND, BNSD, BNSD_BSND and TND, block tables, GQA, sparse modes 0 to 4,
log-sum-exp. Refused by name as not simulated: quantisation, MLA ropes, shared prefixes, left padding, position shifts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .attention_math import DEFAULT, UNBOUNDED, Problem, compute
from .attention_rules import Limits, lengths_of, plan, refuse_given
from .descriptor import Tensor, require, require_dtype
from .environment import CHIP_310P, CHIP_910B, CHIP_A3, Environment
from .operator import LATER, ByLists, Compute, aclnn
from .refusal import NotSimulated, invalid, null

FUSED = "Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md"
INCRE = "Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_incre_flash_attention.md"
PROMPT = "Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_prompt_flash_attention.md"

_LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND")
_KNOWN_LAYOUTS = (*_LAYOUTS, "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND_NTD", "NTD_TND", "NTD", "BSH_BNSD", "BSND_BNSD")

_FUSED_LIMITS = Limits(65536, 20971520)  # FusedInfer, table of axes
_INCRE_LIMITS = {CHIP_910B: Limits(65535, 262144), CHIP_310P: Limits(256, 65536)}  # Incre, constraints
_PROMPT_LIMITS = {
    CHIP_910B: Limits(65536, 20971520),
    CHIP_A3: Limits(65536, 20971520),
    CHIP_310P: Limits(128, 65535),
}  # Prompt, constraints


_OPTIONAL = (
    *("deqScale1", "quantScale1", "deqScale2", "quantScale2", "quantOffset2", "antiquantScale", "antiquantOffset"),
    *("blockTable", "queryPaddingSize", "kvPaddingSize", "keyAntiquantScale", "keyAntiquantOffset"),
    *("valueAntiquantScale", "valueAntiquantOffset", "keySharedPrefix", "valueSharedPrefix"),
    *("actualSharedPrefixLen", "queryRope", "keyRope", "keyRopeAntiquantScale"),
)
"""The arguments of FusedInfer from the eighth on, in C's order."""
_TABLE = _OPTIONAL.index("blockTable")


def _one_list(function: str, name: str, tensors: tuple[Tensor, ...] | None) -> Tensor:
    if not tensors:
        raise null(name)
    if len(tensors) > 1:
        raise NotSimulated(function, f"{name} as a list of several tensors")
    return tensors[0]


def _check_layout(function: str, layout: str, supported: tuple[str, ...]) -> None:
    if layout not in supported:
        if layout in _KNOWN_LAYOUTS and function.startswith("aclnnFused"):
            raise NotSimulated(function, f"layout {layout}")
        raise invalid(f"inputLayout {layout!r} is not supported by {function}.")


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    layout: str,
    key_heads: int,
) -> Problem:
    """A call without a block table, a band or lengths."""
    return Problem(
        layout=layout,
        query=query,
        key=key,
        value=value,
        out=out,
        lse=None,
        mask=mask,
        block_table=None,
        block_size=0,
        heads=heads,
        key_heads=key_heads,
        width=0,
        batch=0,
        span=0,
        extent=0,
        scale=scale,
        sparse_mode=DEFAULT,
        before=UNBOUNDED,
        after=UNBOUNDED,
    )


def _fused(function: str, ropes: int, environment: Environment, arguments: tuple[Any, ...]) -> ByLists:
    """aclnnFusedInferAttentionScoreV2 (`ropes` 0) and V3 (3 more tensors), arguments in C's order."""
    tensors, rest = arguments[: 24 + ropes], arguments[24 + ropes :]
    query, keys, values, shift, mask = tensors[:5]
    table, optional = tensors[7 + _TABLE], tensors[7:]
    if shift is not None or optional.count(None) + (table is not None) < len(optional):
        given = {name: one for name, one in zip(_OPTIONAL, optional, strict=False) if one is not None}
        given.pop("blockTable", None)
        if given.get("actualSharedPrefixLen") is LATER:
            del given["actualSharedPrefixLen"]
        refuse_given(function, pseShift=shift, **given)
    heads, scale, before, after, layout, key_heads, sparse, precise, block_size, antiquant, want_lse, _, _, out, lse = (
        rest
    )
    if environment.chip not in (CHIP_910B, CHIP_A3):
        raise invalid(f"{function} is not supported on this chip: {environment.chip}.")  # FusedInfer, products
    require(query=query, attentionOut=out)
    _check_layout(function, layout, _LAYOUTS)
    if antiquant:
        raise NotSimulated(function, "antiquantMode")
    if precise not in (0, 1, 2, 3):
        raise invalid(f"innerPrecise must be 0 to 3, but is {precise}.")
    key, value = _one_list(function, "key", keys), _one_list(function, "value", values)
    problem = _problem(query, key, value, out, mask, heads, scale, layout, key_heads)
    problem.lse, problem.block_table, problem.block_size = lse if want_lse else None, table, block_size
    problem.sparse_mode, problem.before, problem.after = sparse, before, after
    planned = plan(function, environment, problem, _FUSED_LIMITS)
    if planned.lse is not None:
        require_dtype("softmaxLse", planned.lse, (torch.float32,))

    def by_lists(
        actual: tuple[int, ...] | None, actual_keys: tuple[int, ...] | None, prefix: tuple[int, ...] | None
    ) -> Compute:
        if prefix:
            raise NotSimulated(function, "actualSharedPrefixLen")
        rows, own = lengths_of(planned, actual, actual_keys, _FUSED_LIMITS)
        if precise not in (0, 1) and planned.layout != "TND" and max(rows, default=0) == 1:
            raise invalid(f"innerPrecise must be 0 or 1 when Q_S is 1, but is {precise}.")
        return functools.partial(compute, planned, rows, own)

    return by_lists


_FUSED_HEAD = "tensor 2*tensors 2*tensor 2*ints 7*tensor tensor 2*tensor 4*tensor 2*tensor ints"
_FUSED_TAIL = "int64 double 2*int64 string 4*int64 int64 bool 2*int64 2*tensor"


@aclnn(
    "aclnnFusedInferAttentionScoreV2",
    f"{_FUSED_HEAD} {_FUSED_TAIL}",
    serves="npu_fused_infer_attention_score before CANN 8.1",
    document=FUSED,
    since="8.0.RC2",
    max_workspace=True,
    lists_apart=True,
)
def fused_infer_attention_score_v2(environment: Environment, *arguments: Any) -> ByLists:
    """Attention of queries [B, S, N, D] (or another layout) on dense or paged keys and values."""
    return _fused("aclnnFusedInferAttentionScoreV2", 0, environment, arguments)


@aclnn(
    "aclnnFusedInferAttentionScoreV3",
    f"{_FUSED_HEAD} 3*tensor {_FUSED_TAIL}",
    serves="npu_fused_infer_attention_score",
    document=FUSED,
    since="8.1.RC1",
    max_workspace=True,
    lists_apart=True,
)
def fused_infer_attention_score_v3(environment: Environment, *arguments: Any) -> ByLists:
    """V2 with the ropes of MLA, which are not simulated."""
    return _fused("aclnnFusedInferAttentionScoreV3", 3, environment, arguments)


@aclnn(
    "aclnnIncreFlashAttentionV4",
    "tensor 2*tensors 2*tensor ints 9*tensor int64 double string 3*int64 tensor",
    serves="npu_incre_flash_attention",
    document=INCRE,
    lists_apart=True,
)
def incre_flash_attention_v4(environment: Environment, *arguments: Any) -> ByLists:
    """One query token a sequence: [B, 1, H], [B, 1, N, D] or [B, N, 1, D]; `actual` are the keys' lengths."""
    function = "aclnnIncreFlashAttentionV4"
    query, keys, values, shift, mask = arguments[:5]
    table = arguments[13]
    given = (*arguments[6:13], arguments[14])
    heads, scale, layout, key_heads, block_size, precise, out = arguments[15:]
    refuse_given(function, pseShift=shift, **{f"optional tensor {i}": one for i, one in enumerate(given)})
    if environment.chip not in _INCRE_LIMITS:
        raise invalid(f"{function} is not supported on this chip: {environment.chip}.")  # Incre, products
    require(query=query, attentionOut=out)
    _check_layout(function, layout, ("BSH", "BSND", "BNSD"))
    if precise not in (0, 1):
        raise invalid(f"innerPrecise must be 0 or 1, but is {precise}.")
    if (query.shape[2] if layout == "BNSD" and len(query.shape) == 4 else query.shape[1]) != 1:
        raise invalid(f"query must have one token a sequence, but its shape is {list(query.shape)} in {layout}.")
    key, value = _one_list(function, "key", keys), _one_list(function, "value", values)
    problem = _problem(query, key, value, out, mask, heads, scale, layout, key_heads)
    problem.block_table, problem.block_size = table, block_size
    limits = _INCRE_LIMITS[environment.chip]
    planned = plan(function, environment, problem, limits)
    return lambda actual: functools.partial(compute, planned, *lengths_of(planned, None, actual, limits))


@aclnn(
    "aclnnPromptFlashAttentionV3",
    "5*tensor 2*ints 5*tensor int64 double 2*int64 string 3*int64 tensor",
    serves="npu_prompt_flash_attention",
    document=PROMPT,
    lists_apart=True,
)
def prompt_flash_attention_v3(environment: Environment, *arguments: Any) -> ByLists:
    """Whole prompts on keys that are laid out like the query; no block table."""
    function = "aclnnPromptFlashAttentionV3"
    query, key, value, shift, mask, _, _, *rest = arguments
    given, (heads, scale, before, after, layout, key_heads, sparse, precise, out) = rest[:5], rest[5:]
    refuse_given(function, pseShift=shift, **{f"quantisation tensor {i}": one for i, one in enumerate(given)})
    require(query=query, key=key, value=value, attentionOut=out)
    if precise not in (0, 1, 2, 3):
        raise invalid(f"innerPrecise must be 0 to 3, but is {precise}.")
    old = environment.chip == CHIP_310P
    if old:
        # Prompt, notes on Atlas inference cards: no lengths, default band, sparse mode 0 only.
        if sparse != DEFAULT or before != UNBOUNDED or after not in (0, UNBOUNDED):
            raise invalid(
                f"sparseMode {sparse}, preTokens {before}, nextTokens {after} are not supported on this chip."
            )
        _check_layout(function, layout, ("BSH", "BSND", "BNSD", "BNSD_BSND"))
    _check_layout(function, layout, _LAYOUTS)
    problem = _problem(query, key, value, out, mask, heads, scale, layout, key_heads)
    problem.sparse_mode, problem.before, problem.after = sparse, before, after
    limits = _PROMPT_LIMITS[environment.chip]
    planned = plan(function, environment, problem, limits)

    def by_lists(actual: tuple[int, ...] | None, actual_keys: tuple[int, ...] | None) -> Compute:
        if old and (actual or actual_keys):
            raise invalid("actualSeqLengths and actualSeqLengthsKv are not supported on this chip.")
        return functools.partial(compute, planned, *lengths_of(planned, actual, actual_keys, limits))

    return by_lists


OPERATORS = (
    fused_infer_attention_score_v2,
    fused_infer_attention_score_v3,
    incre_flash_attention_v4,
    prompt_flash_attention_v3,
)
