"""What the NPU backend's operators refuse, by chip and by what CANN exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from polyaccel.backend import Query, Reason
from polyaccel.backend.support import Supports
from polyaccel_npu import cann
from polyaccel_npu.chip import Chip

DTYPES = ("float32", "float16", "bfloat16")
LARGEST_HEAD = 512
HEAD_MULTIPLE = 16
MOST_HEADS = 256
MOST_GROUP = 64
INNER_LIMIT = 65536
"""Last dimensions of grouped matmul are below this."""
LARGEST_ROTARY = 896
MOST_ROTARY_HEADS = 1000
SHORTEST_310P_ROW = 32
"""Bytes of a row that RmsNorm on 310P takes at least."""
SWIGLU_310P_BYTES = 64
"""Of which rows of SwiGlu on 310P are a multiple."""

Rule = Callable[[Query, Chip], list[Reason]]
SCATTER = ("aclnnScatterPaKvCache",)
GROUPED = ("aclnnGroupedMatmulV5", "aclnnGroupedMatmulV4", "aclnnGroupedMatmul")
"""Functions younger than the oldest CANN; torch_npu takes the first one that is there (seen by running it)."""
_WRITING = ("write_kv_cache", "qkv_rope_cache")
_GROUPING = ("sgmv", "sgmv_shrink", "sgmv_expand")


def supports(operator: str, chip: Chip, exports: cann.Exports = lambda function: True) -> Supports:
    """The function that answers queries about an operator or station on a chip. ``exports``: whether CANN has an aclnn
    function."""
    rule = _RULES.get(operator, _plain)
    scatters = any(map(exports, SCATTER))
    groups = any(map(exports, GROUPED))

    def answer(query: Query) -> list[Reason]:
        reasons = rule(query, chip)
        if not scatters and operator in _WRITING:
            reasons.append(f"this CANN has no {SCATTER[0]}")
        if not groups and (operator in _GROUPING or (query.adapters and operator in _ADAPTED)):
            reasons.append(f"this CANN has no {GROUPED[-1]}")
        return reasons

    return answer


def _dtype(query: Query) -> str:
    return str(query.static.get("dtype", "")).removeprefix("torch.")


def _plain(query: Query, chip: Chip) -> list[Reason]:
    reasons, dtype = [], _dtype(query)
    if dtype and dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is none of {', '.join(DTYPES)}")
    if dtype == "bfloat16" and not chip.bfloat16:
        reasons.append(f"chip {chip.family} has no bfloat16")
    if query.static.get("quantised"):
        reasons.append("the weight is quantised")
    return reasons


def _any_weight(query: Query, chip: Chip) -> list[Reason]:
    return [reason for reason in _plain(query, chip) if reason != "the weight is quantised"]


def _wide_product(query: Query, chip: Chip) -> list[Reason]:
    if _dtype(query) != "float32" or chip.float32_products:
        return []
    return [f"chip {chip.family} multiplies float32 as float16; load the model as float16"]


def _linear(query: Query, chip: Chip) -> list[Reason]:
    return [*_any_weight(query, chip), *_wide_product(query, chip)]


def _norm(query: Query, chip: Chip) -> list[Reason]:
    reasons = _plain(query, chip)
    width = query.integer("hidden") * (4 if _dtype(query) == "float32" else 2)
    if chip.family == "310P" and width < SHORTEST_310P_ROW:
        reasons.append(f"rows of {width} bytes; RmsNorm on 310P takes {SHORTEST_310P_ROW} and more")
    return reasons


def _heads(query: Query) -> list[Reason]:
    reasons = []
    heads, kv_heads, head_dim = query.integer("heads", 1), query.integer("kv_heads", 1), query.integer("head_dim", 64)
    if kv_heads < 1 or heads % kv_heads:
        reasons.append(f"{heads} query heads are no multiple of {kv_heads} key heads")
    elif heads // kv_heads > MOST_GROUP:
        reasons.append(f"{heads // kv_heads} query heads share a key head, FIA takes at most {MOST_GROUP}")
    if heads > MOST_HEADS:
        reasons.append(f"{heads} heads, FIA takes at most {MOST_HEADS}")
    if head_dim > LARGEST_HEAD or head_dim % HEAD_MULTIPLE:
        reasons.append(f"heads of {head_dim}, FIA takes multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD}")
    return reasons


def _fia(query: Query, chip: Chip) -> list[Reason]:
    reasons = [*_plain(query, chip), *_heads(query)]
    if _dtype(query) not in ("float16", "bfloat16"):
        reasons.append(f"dtype {_dtype(query) or 'unknown'}; FIA takes float16 and bfloat16")
    if not chip.paged:
        reasons.append(f"chip {chip.family} has no paged attention in this layout")
    window, longest = query.static.get("window"), query.ranges.get("context", (1, 2**62))[1]
    if isinstance(window, int) and window < longest:
        reasons.append("FIA multiplies the keys before a window by 0, and 0 times an infinity left there is NaN")
    return reasons


def _scatter(query: Query, chip: Chip) -> list[Reason]:
    reasons = _plain(query, chip)
    if not chip.paged:
        reasons.append(f"chip {chip.family} scatters keys and values in NZ layout alone")
    return reasons


def _rotary(query: Query, chip: Chip) -> list[Reason]:
    reasons, head_dim = _plain(query, chip), query.integer("head_dim", 2)
    rotary_dim = query.integer("rotary_dim", head_dim - head_dim % 2)
    if rotary_dim % 2 or rotary_dim > head_dim or rotary_dim >= LARGEST_ROTARY:
        reasons.append(f"rotary_dim {rotary_dim} is odd, above head_dim {head_dim} or not below {LARGEST_ROTARY}")
    if query.integer("heads") >= MOST_ROTARY_HEADS:
        reasons.append(f"{query.integer('heads')} heads; the rotary operator takes fewer than {MOST_ROTARY_HEADS}")
    if not chip.paged:
        reasons.append(f"chip {chip.family} has no aclnnRotaryPositionEmbedding")
    return reasons


def _sgmv(query: Query, chip: Chip) -> list[Reason]:
    # What the base is stored as is no affair of its adapters.
    reasons = _any_weight(query, chip)
    if not chip.grouped_float32:
        reasons.append(f"grouped matmul on {chip.family} takes one float16 weight of 3 dimensions, segments need lists")
    slices = query.static.get("slices", ())
    widths = (query.integer("k"), *(slices if isinstance(slices, tuple) else ()))
    if max(widths) >= INNER_LIMIT:
        reasons.append(f"a width of {max(widths)}; grouped matmul takes less than {INNER_LIMIT}")
    return reasons


def _adapted(query: Query, chip: Chip) -> list[Reason]:
    return list(dict.fromkeys([*_plain(query, chip), *(_sgmv(query, chip) if query.adapters else [])]))


def _station(query: Query, chip: Chip) -> list[Reason]:
    return [*_adapted(query, chip), *_wide_product(query, chip)]


def _swiglu_width(query: Query, chip: Chip) -> list[Reason]:
    slices = query.static.get("slices", ())
    widths = slices if isinstance(slices, tuple) and slices else (2 * query.integer("n"),)
    if chip.family == "310P" and sum(widths) * (4 if _dtype(query) == "float32" else 2) % SWIGLU_310P_BYTES:
        return [f"rows of {sum(widths)}; SwiGlu on 310P takes multiples of {SWIGLU_310P_BYTES} bytes"]
    return []


def _silu_and_mul(query: Query, chip: Chip) -> list[Reason]:
    return [*_plain(query, chip), *_swiglu_width(query, chip)]


def _gate_up_act(query: Query, chip: Chip) -> list[Reason]:
    act = query.static.get("act", "silu")
    return [
        *_station(query, chip),
        *_swiglu_width(query, chip),
        *([] if act == "silu" else [f"the activation is silu here, {act!r} was asked for"]),
    ]


def _qkv(query: Query, chip: Chip) -> list[Reason]:
    reasons = [*_station(query, chip), *_rotary(query, chip), *_scatter(query, chip)]
    return list(dict.fromkeys(reasons))


_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "linear": _linear,
        "dequantize": lambda query, chip: [],
        "rms_norm": _norm,
        "silu_and_mul": _silu_and_mul,
        "paged_attention": _fia,
        "dense_attention": _fia,
        "write_kv_cache": _scatter,
        "rotary_embedding": _rotary,
        "sgmv": _sgmv,
        "sgmv_shrink": _sgmv,
        "sgmv_expand": _sgmv,
        "embedding": _adapted,
        "column_linear": _station,
        "gate_up_act": _gate_up_act,
        "qkv_rope_cache": _qkv,
        "row_parallel_linear": _station,
        "row_parallel_add_norm": _station,
    }
)
_ADAPTED = (
    *("embedding", "column_linear", "gate_up_act", "qkv_rope_cache"),
    *("row_parallel_linear", "row_parallel_add_norm"),
)
