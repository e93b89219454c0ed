"""The operators of the contract, version 1.0. Names are the field's; shapes use T tokens, R rows of logits, H heads."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch

from polyaccel.backend.spec import EXACT, FLOATS, Argument, ArgumentKind, Layout, NonFinite, Numerics, OperatorSpec

I64 = (torch.int64,)
F32 = (torch.float32,)
ANY = (Layout.STRIDED,)


def tensor(
    name: str,
    shape: str,
    *,
    mutated: bool = False,
    optional: bool = False,
    alias: tuple[str, ...] = (),
    non_finite: NonFinite = NonFinite.PROPAGATES,
) -> Argument:
    return Argument(
        name=name,
        shape=shape,
        dtypes=FLOATS,
        mutated=mutated,
        optional=optional,
        may_alias=alias,
        non_finite=non_finite,
    )


def kind(name: str, kind: ArgumentKind, *, optional: bool = False) -> Argument:
    return Argument(name=name, kind=kind, optional=optional)


def attribute(name: str, *values: object) -> Argument:
    return Argument(name=name, kind="attribute", values=values)


WEIGHT = kind("weight", "weight")
STEP = kind("step", "step")
COMM = kind("comm", "communicator")
KV = kind("kv", "kv")
ROW_SET = attribute("row_set", "tokens", "logits")

SGMV_NUMERICS = Numerics(intermediates=MappingProxyType({"h": ("x", "float32")}))
ATTENTION_NUMERICS = Numerics(
    intermediates=MappingProxyType({"p": ("v", "float32")}), ulps=MappingProxyType({"exp": 2, "divide": 1})
)

_DENSE = (
    OperatorSpec(
        name="embedding",
        group="dense",
        semantics=(
            "Row ``token_ids[t] - vocabulary_start`` of the weight; ids outside this rank's rows give zeros. With "
            "adapters: "
            "plus ``weight * (B @ A[:, id])`` for each triple, this rank's columns of A."
        ),
        arguments=(WEIGHT, STEP, attribute("vocabulary_start")),
        returns="x: [T, hidden] of the weight's dtype",
        numerics=SGMV_NUMERICS,
    ),
    OperatorSpec(
        name="linear",
        group="dense",
        semantics="``x @ W.T + bias`` over all slices; the bias is the weight's. Quantised weights as dequantised.",
        arguments=(tensor("x", "[T, k]"), WEIGHT),
        returns="y: [T, n] of x's dtype",
        critical=True,
        mandatory=True,
    ),
    OperatorSpec(
        name="rms_norm",
        group="dense",
        semantics=(
            "``s = x + residual`` when a residual is given (rounded once to x's dtype), else ``s = x``; returns "
            "``s * rsqrt(mean(s^2) + eps) * weight`` over the last dimension, statistics in float32. With a residual "
            "the "
            "result is ``(normed, s)``."
        ),
        arguments=(
            tensor("x", "[..., hidden]"),
            tensor("weight", "[hidden]"),
            attribute("eps"),
            tensor("residual", "[..., hidden]", optional=True, alias=("x",)),
        ),
        returns="normed, or (normed, s)",
        numerics=Numerics(
            ulps=MappingProxyType({"rsqrt": 2}), intermediates=MappingProxyType({"normed": ("x", "float32")})
        ),
        critical=True,
    ),
    OperatorSpec(
        name="layer_norm",
        group="dense",
        semantics=(
            "``(x - mean) * rsqrt(var + eps) * weight + bias`` over the last dimension, statistics in float32; var is "
            "the mean of ``(x - mean)^2``."
        ),
        arguments=(
            tensor("x", "[..., hidden]"),
            tensor("weight", "[hidden]"),
            tensor("bias", "[hidden]", optional=True),
            attribute("eps"),
        ),
        returns="y as x",
        numerics=Numerics(ulps=MappingProxyType({"rsqrt": 2})),
    ),
    OperatorSpec(
        name="rotary_embedding",
        group="dense",
        semantics=(
            "Rotates the first ``rotary_dim`` of each head by the angles of its token's position; pairs are (i, i + "
            "half) "
            "for style half, (2i, 2i + 1) for style interleaved. cos and sin are float32 operands; computed in float32."
        ),
        arguments=(
            tensor("q", "[T, heads, head_dim]"),
            tensor("k", "[T, kv_heads, head_dim]"),
            kind("rope", "rope"),
            STEP,
        ),
        returns="(q, k), new tensors",
        critical=True,
    ),
    OperatorSpec(
        name="silu_and_mul",
        group="dense",
        semantics="``silu(x[:, :n]) * x[:, n:]``, computed in float32.",
        arguments=(tensor("x", "[T, 2 n]"),),
        returns="y: [T, n]",
        numerics=Numerics(
            ulps=MappingProxyType({"exp": 2, "divide": 1}), intermediates=MappingProxyType({"silu": ("x", "float32")})
        ),
        critical=True,
    ),
    OperatorSpec(
        name="gelu",
        group="dense",
        semantics="GELU, exact (erf) or by tanh.",
        arguments=(tensor("x", "[T, n]"), attribute("approximate", "none", "tanh")),
        returns="y as x",
        numerics=Numerics(ulps=MappingProxyType({"erf": 4, "tanh": 4})),
    ),
    OperatorSpec(
        name="select_rows",
        group="dense",
        semantics="The rows of x whose logits are needed: ``x[logits_rows]``.",
        arguments=(tensor("x", "[T, hidden]"), STEP),
        returns="[R, hidden]; may be x itself when that is all rows in order",
        numerics=EXACT,
    ),
)


def _attended(name: str) -> Argument:
    # A masked weight is 0, and 0 times infinity is NaN: tiles of keys are multiplied as a whole.
    return Argument(name=name, shape="[T, kv_heads, head_dim]", dtypes=FLOATS, non_finite=NonFinite.SEGMENT)


_ATTENTION = (
    OperatorSpec(
        name="write_kv_cache",
        group="attention",
        semantics="Stores each token's key and value at its ``kv_slots``; slot -1 stores nothing.",
        arguments=(
            tensor("k", "[T, kv_heads, head_dim]"),
            tensor("v", "[T, kv_heads, head_dim]"),
            KV,
            attribute("layer"),
            STEP,
        ),
        returns="nothing; the cache is mutated",
        numerics=EXACT,
        critical=True,
    ),
    OperatorSpec(
        name="paged_attention",
        group="attention",
        semantics=(
            "Causal attention of each sequence's query tokens (the last ones of its context) over its cached keys "
            "and values: "
            "prefill, chunked prefill and decode in one ragged call. Query head h uses key head h // (heads / "
            "kv_heads). With a "
            "window w a query at index i sees keys j with i - w < j <= i. ``softmax(scale * q k^T) v``, float32 "
            "softmax. Queries that see no key give zeros. Slots that no query of the step sees may hold anything, NaN "
            "included: nothing of it reaches the output."
        ),
        arguments=(
            tensor("q", "[T, heads, head_dim]"),
            KV,
            attribute("layer"),
            STEP,
            attribute("scale"),
            attribute("window"),
        ),
        returns="[T, heads, head_dim] of q's dtype",
        numerics=ATTENTION_NUMERICS,
        critical=True,
    ),
    OperatorSpec(
        name="dense_attention",
        group="attention",
        semantics=(
            "Attention without a cache inside each of the segments ``starts`` (host ints), causal or not. Tokens of no "
            "segment give zeros; their keys and values are not read."
        ),
        arguments=(
            tensor("q", "[T, heads, head_dim]"),
            _attended("k"),
            _attended("v"),
            attribute("starts"),
            attribute("scale"),
            attribute("causal", True, False),
        ),
        returns="[T, heads, head_dim]",
        numerics=ATTENTION_NUMERICS,
    ),
)

_LORA = (
    OperatorSpec(
        name="sgmv",
        group="lora",
        semantics=(
            "``y[row] += mix * (x[row] @ A[slot].T) @ B[slot].T`` for each (row, slot, mix) triple of the row set, "
            "for every "
            "slice of the weight at once (its own A and B, its own columns of y). The scale is folded into B. Any "
            "rank, any "
            "width, slices narrower than the rank. Punica, S-LoRA."
        ),
        # Rank rows that pad a slice are zero, and zero times NaN is NaN: x may reach slices that its adapter lacks.
        arguments=(
            tensor("y", "[T, n]", mutated=True),
            tensor("x", "[T, k]", non_finite=NonFinite.SEGMENT),
            WEIGHT,
            STEP,
            ROW_SET,
        ),
        returns="y",
        numerics=SGMV_NUMERICS,
        critical=True,
    ),
    OperatorSpec(
        name="sgmv_shrink",
        group="lora",
        semantics="``h[i, slice, :rank] = x[row_i] @ A.T`` for each triple; columns beyond the true rank are zero.",
        arguments=(tensor("x", "[T, k]"), WEIGHT, STEP, ROW_SET),
        returns="h: [triples, slices, largest rank of the site] float32 or x's dtype",
        numerics=SGMV_NUMERICS,
    ),
    OperatorSpec(
        name="sgmv_expand",
        group="lora",
        semantics="``y[row_i] += mix_i * h[i, slice, :rank] @ B.T`` on each slice's columns.",
        arguments=(tensor("y", "[T, n]", mutated=True), tensor("h", "[triples, slices, r]"), WEIGHT, STEP, ROW_SET),
        returns="y",
        numerics=SGMV_NUMERICS,
    ),
)

_MOE = (
    OperatorSpec(
        name="moe_route",
        group="moe",
        semantics=(
            "Chooses ``top_k`` experts a token from router logits, in float32. softmax_topk: softmax over all, then "
            "the largest; "
            "topk_softmax: the largest, then softmax over them; sigmoid: largest of sigmoid + bias (the weight is "
            "the unbiased "
            "sigmoid), restricted to ``topk_groups`` of ``groups`` groups scored by the sum of their two best. "
            "``renormalise`` "
            "divides by the sum, ``scale`` multiplies. Ties: lowest id first; ids in order of falling score."
        ),
        arguments=(
            tensor("logits", "[T, experts]"),
            attribute("top_k"),
            attribute("scoring", "softmax_topk", "topk_softmax", "sigmoid"),
            attribute("renormalise", True, False),
            Argument(name="bias", shape="[experts]", dtypes=F32, optional=True),
            attribute("groups"),
            attribute("topk_groups"),
            attribute("scale"),
        ),
        returns="(weights: [T, top_k] float32, ids: [T, top_k] int32)",
        numerics=Numerics(ulps=MappingProxyType({"exp": 2, "divide": 1})),
    ),
    OperatorSpec(
        name="moe_experts",
        group="moe",
        semantics=(
            "``sum_j weights[t, j] * down_e(act(gate_up_e(x[t])))`` over the experts e = ids[t, j] that this rank "
            "holds "
            "(``expert_map``: global id to local, -1 elsewhere). A partial sum: the caller reduces over ranks. "
            "Adapters of the "
            "step apply to each expert's projections. Float or quantised weights."
        ),
        arguments=(
            tensor("x", "[T, hidden]"),
            kind("gate_up", "weight"),
            kind("down", "weight"),
            Argument(name="ids", shape="[T, top_k]", dtypes=(torch.int32,)),
            Argument(name="weights", shape="[T, top_k]", dtypes=F32),
            STEP,
            attribute("act", "silu"),
            Argument(name="expert_map", shape="[experts]", dtypes=(torch.int32,), optional=True),
        ),
        returns="[T, hidden]",
        numerics=Numerics(
            intermediates=MappingProxyType(
                {"gate_up": ("x", "float32"), "act": ("x", "float32"), "h": ("x", "float32")}
            )
        ),
        critical=True,
    ),
)

_OTHERS = (
    OperatorSpec(
        name="dequantize",
        group="quantised",
        semantics="The weight as a plain tensor, slices joined; quantised values exactly as the canonical form says.",
        arguments=(WEIGHT,),
        returns="[n, k] or [experts, n, k] of the weight's dtype; may be a view",
        numerics=EXACT,
        mandatory=True,
    ),
    OperatorSpec(
        name="sample",
        group="sampling",
        semantics=(
            "Per row: penalties (repetition, presence, frequency), bias, mask, temperature, top-k, top-p, min-p in "
            "this order "
            "(ties: lowest id first); then the inverse CDF at the row's uniform over the kept ids in ascending id. "
            "Temperature 0 "
            "is argmax, lowest id. Updates counts and the last token of each request slot. The uniforms and the "
            "request slot of "
            "each row come with the step. A row's result depends on nothing but that row."
        ),
        arguments=(
            Argument(
                name="logits",
                shape="[R, vocabulary]",
                dtypes=FLOATS,
                layouts=(Layout.ROWS,),
                non_finite=NonFinite.MASKED,
            ),
            kind("state", "sampling"),
            STEP,
        ),
        returns="SampleOutput",
        critical=True,
    ),
)


def _collective(
    name: str, semantics: str, arguments: tuple[Argument, ...], returns: str, numerics: Numerics = EXACT
) -> OperatorSpec:
    return OperatorSpec(
        name=name, group="ranks", semantics=semantics, arguments=arguments, returns=returns, numerics=numerics
    )


_X = Argument(name="x", shape="[...]", dtypes=FLOATS, layouts=(Layout.CONTIGUOUS,))
_IN_PLACE = replace(_X, mutated=True)
_RANKS = (
    _collective(
        "all_reduce",
        "Sum over ranks, in place, identical bits on all.",
        (_IN_PLACE, COMM),
        "x",
        Numerics(accumulator=torch.bfloat16),
    ),
    _collective(
        "all_gather", "Joined along ``dim`` in rank order.", (_X, COMM, attribute("dim")), "[..., world * n, ...]"
    ),
    _collective(
        "reduce_scatter",
        "Sum over ranks, this rank's rows.",
        (_X, COMM),
        "[rows / world, ...]",
        Numerics(accumulator=torch.bfloat16),
    ),
    _collective(
        "all_to_all",
        "Rows exchanged by the counts.",
        (_X, COMM, attribute("send_rows"), attribute("receive_rows")),
        "[received, ...]",
    ),
    _collective("broadcast", "The source's content, in place.", (_IN_PLACE, COMM, attribute("source")), "x"),
    _collective("barrier", "Returns when every rank has called it.", (COMM,), "nothing"),
)

OPERATORS: MappingProxyType[str, OperatorSpec] = MappingProxyType(
    {spec.name: spec for spec in (*_DENSE, *_ATTENTION, *_LORA, *_MOE, *_OTHERS, *_RANKS)}
)
