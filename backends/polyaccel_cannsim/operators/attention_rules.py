"""The documented limits that the attention operators share: operands, heads, layouts, caches, lengths, masks.

"FusedInfer", "Incre", "Prompt": the pages that attention.py names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention_math import BAND, COMPRESSED, DEFAULT, UNBOUNDED, Problem
from .descriptor import (
    HALF,
    Tensor,
    require,
    require_contiguous,
    require_dtype,
    require_plain,
    require_rank,
    require_same_dtype,
    require_shape,
)
from .environment import CHIP_310P, Environment
from .refusal import NotSimulated, invalid, tiling

_MAX_HEADS = 256  # FusedInfer: N
_MAX_WIDTH = 512  # FusedInfer: D
_MAX_RATIO = 64  # FusedInfer, num_key_value_heads
_ALIGN_WIDTH = 16  # FusedInfer, D: multiple of 16 for float16 and bfloat16
_MAX_ROW = 65535  # FusedInfer, page attention: KV_N * D of a BnBsH cache
_MAX_BLOCK = 512  # FusedInfer, block_size, all layouts but TND
_ALIGN_BLOCK = 16  # FusedInfer, block_size at Q_S = 1 and in TND
_ALIGN_BLOCK_PREFILL = 128  # FusedInfer, block_size at Q_S > 1
_MAX_BLOCK_TND = 1024  # FusedInfer, TND, D != 512
_MAX_SEQUENCES_TND = 4096  # FusedInfer, TND
_WIDTHS_TND = (128, 192)  # FusedInfer, TND without rope


@dataclass(frozen=True)
class Limits:
    """Largest batch and sequence of an operator on a chip."""

    batch: int
    keys: int


def refuse_given(function: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise NotSimulated(function, name)


def _check_operands(
    function: str, environment: Environment, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor
) -> None:
    require(query=query, key=key, value=value, attentionOut=out)
    require_plain(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype == torch.int8:
            raise NotSimulated(function, f"INT8 {name}")
        require_dtype(name, tensor, (torch.float16,) if environment.chip == CHIP_310P else HALF)
    require_same_dtype(query=query, key=key, value=value, attentionOut=out)
    # FusedInfer, parameters: a cross under "non-contiguous" for every tensor.
    require_contiguous(query=query, key=key, value=value, attenMask=mask)
    require_dtype("attenMask", mask, (torch.bool, torch.int8, torch.uint8))
    require_rank("attenMask", mask, 2, 4)


def _geometry(layout: str, query: Tensor, heads: int) -> tuple[int, int, int]:
    """(batch or 0 for TND, Q_S or T, D) of the query."""
    require_rank("query", query, 3, 3) if layout in ("BSH", "TND") else require_rank("query", query, 4, 4)
    if layout == "BSH":
        if query.shape[2] % heads:
            raise invalid(f"H {query.shape[2]} of query is not a multiple of numHeads {heads}.")
        return query.shape[0], query.shape[1], query.shape[2] // heads
    if layout == "TND":
        batch, length, count = 0, query.shape[0], query.shape[1]
    elif layout == "BSND":
        batch, length, count = query.shape[0], query.shape[1], query.shape[2]
    else:
        batch, count, length = query.shape[:3]
    if count != heads:
        raise invalid(f"the N axis of query is {count}, but numHeads is {heads}.")
    return batch, length, query.shape[-1]


def _check_heads(heads: int, key_heads: int) -> int:
    key_heads = key_heads or heads  # FusedInfer, num_key_value_heads: 0 means as many as query heads
    if heads <= 0 or key_heads < 0 or heads % key_heads or heads // key_heads > _MAX_RATIO:
        raise invalid(f"numHeads {heads} must be a multiple, at most {_MAX_RATIO}, of numKeyValueHeads {key_heads}.")
    if max(heads, key_heads) > _MAX_HEADS:
        raise invalid(f"numHeads and numKeyValueHeads must not exceed {_MAX_HEADS}.")
    return key_heads


def _dense_keys(layout: str, key: Tensor, batch: int, key_heads: int, width: int) -> int:
    """KV_S of keys that are laid out like the query; T for TND."""
    if layout == "TND":
        expected: tuple[int, ...] = (key.shape[0], key_heads, width)
        length = key.shape[0]
    elif layout == "BSH":
        length = key.shape[1]
        expected = (batch, length, key_heads * width)
    elif layout == "BSND":
        length = key.shape[1]
        expected = (batch, length, key_heads, width)
    else:
        length = key.shape[2] if len(key.shape) == 4 else -1
        expected = (batch, key_heads, length, width)
    if key.shape != expected:
        raise invalid(f"key of shape {list(key.shape)} must have shape {list(expected)} in layout {layout}.")
    return length


def _check_cache(layout: str, key: Tensor, block_size: int, key_heads: int, width: int, prefill: bool) -> None:
    """FusedInfer, page attention."""
    if layout == "TND":
        if not 0 < block_size <= _MAX_BLOCK_TND or block_size % _ALIGN_BLOCK:
            raise tiling(f"blockSize must be a multiple of {_ALIGN_BLOCK} up to {_MAX_BLOCK_TND} in TND: {block_size}.")
    elif prefill and (not _ALIGN_BLOCK_PREFILL <= block_size <= _MAX_BLOCK or block_size % _ALIGN_BLOCK_PREFILL):
        raise tiling(f"blockSize must be 128, 256, 384 or 512 when Q_S is greater than 1, but is {block_size}.")
    elif not 0 < block_size <= _MAX_BLOCK or block_size % _ALIGN_BLOCK:
        raise tiling(f"blockSize must be a multiple of {_ALIGN_BLOCK} up to {_MAX_BLOCK}, but is {block_size}.")
    rows = (key.shape[0], block_size, key_heads * width)
    heads_first = (key.shape[0], key_heads, block_size, width)
    if len(key.shape) == 5:
        raise NotSimulated("page attention", "a cache in NZ")
    if key.shape == rows:
        if key_heads * width > _MAX_ROW:
            raise tiling(f"KV_N * D must not exceed {_MAX_ROW} in a cache [blocks, blockSize, H]: {key_heads * width}.")
    elif key.shape != heads_first:
        raise tiling(f"the cache must have shape {list(rows)} or {list(heads_first)}, but has {list(key.shape)}.")
    elif layout in ("BSH", "BSND"):
        raise tiling(f"layout {layout} supports only caches [blocks, blockSize, H], but got {list(key.shape)}.")


def _check_table(table: Tensor, key: Tensor, block_size: int, lengths: tuple[int, ...]) -> None:
    needed = [-(-length // block_size) for length in lengths]
    if table.shape[0] != len(lengths) or table.shape[1] < max(needed, default=0):
        raise tiling(
            f"blockTable must be [{len(lengths)}, {max(needed, default=0)} or more], but has shape {list(table.shape)}."
        )
    if sum(needed) > key.shape[0]:
        # FusedInfer, page attention: "blocknum is not less than the sum of the batches' blocks", shared ones twice.
        raise tiling(f"the cache has {key.shape[0]} blocks, but the sequences need {sum(needed)}.")


def _lengths(name: str, given: tuple[int, ...] | None, batch: int, limit: int) -> tuple[int, ...]:
    """Per-sequence lengths: missing means full, one value serves all, more than the batch are cut."""
    if given is None or len(given) == 0:
        return (limit,) * batch
    if len(given) != 1 and len(given) < batch:
        raise invalid(f"{name} must have 1 or at least {batch} values, but has {len(given)}.")
    found = given * batch if len(given) == 1 else given[:batch]
    if found and (min(found) < 0 or max(found) > limit):
        raise invalid(f"{name} must lie in [0, {limit}], but is {list(found)}.")
    return found


def _cumulative(name: str, given: tuple[int, ...] | None, total: int) -> tuple[int, ...]:
    """FusedInfer, TND: running totals, one a sequence, that end at T at most."""
    if not given:
        raise invalid(f"{name} must be given in layout TND.")
    if len(given) > _MAX_SEQUENCES_TND:
        raise invalid(f"{name} must have at most {_MAX_SEQUENCES_TND} values, but has {len(given)}.")
    starts = (0, *given[:-1])
    if any(end < start for start, end in zip(starts, given, strict=True)) or given[-1] > total:
        raise invalid(f"{name} must be running totals up to {total}, but is {list(given)}.")
    return tuple(end - start for start, end in zip(starts, given, strict=True))


def _check_mask(problem: Problem) -> None:
    """FusedInfer, sparse_mode."""
    mask, mode = problem.mask, problem.sparse_mode
    if not DEFAULT <= mode <= BAND:
        raise invalid(f"sparseMode {mode} is not supported, only 0 to 4 are.")
    if mode != DEFAULT and mask is None:
        raise invalid(f"attenMask must be given when sparseMode is {mode}.")
    if mask is None:
        return
    if mode > 1:
        if mask.shape[-2:] != (COMPRESSED, COMPRESSED) or any(size != 1 for size in mask.shape[:-2]):
            raise invalid(f"attenMask must be [{COMPRESSED}, {COMPRESSED}] for sparseMode {mode}: {list(mask.shape)}.")
    elif problem.layout == "TND":
        raise invalid("layout TND supports sparseMode 0 only without attenMask.")


def _check_cover(mask: Tensor, queries: int, keys: int, given: int) -> None:
    """FusedInfer, sparse_mode 0 and 1: one mask, or one a sequence."""
    if (
        mask.shape[-2] < queries or mask.shape[-1] < keys or any(size not in (1, given) for size in mask.shape[:-2])
    ) or (len(mask.shape) == 4 and mask.shape[1] != 1):
        raise invalid(f"attenMask {list(mask.shape)} must cover [{queries}, {keys}] for each of {given} sequences.")


def plan(function: str, environment: Environment, problem: Problem, limits: Limits) -> Problem:
    """What all operators demand whatever the lengths; fills in the rest of the problem, and returns it."""
    layout, table = problem.layout, problem.block_table
    _check_operands(function, environment, problem.query, problem.key, problem.value, problem.mask, problem.out)
    key_heads = _check_heads(problem.heads, problem.key_heads)
    batch, span, width = _geometry(layout, problem.query, problem.heads)
    if problem.value.shape != problem.key.shape:
        if layout == "TND" and problem.key.shape[:-1] == problem.value.shape[:-1]:
            raise NotSimulated(function, "a value width other than the key's")
        raise invalid(f"key {list(problem.key.shape)} and value {list(problem.value.shape)} must have one shape.")
    if width > _MAX_WIDTH or width % _ALIGN_WIDTH:
        raise tiling(f"D must be a multiple of {_ALIGN_WIDTH} up to {_MAX_WIDTH}, but is {width}.")
    tnd = layout == "TND"
    if tnd and width not in _WIDTHS_TND:
        raise tiling(f"D must be 128 or 192 in layout TND, but is {width}.")
    if batch > limits.batch:
        raise tiling(f"the batch must not exceed {limits.batch}, but is {batch}.")
    if table is not None:
        _check_cache(layout, problem.key, problem.block_size, key_heads, width, span > 1)
        require_rank("blockTable", table, 2, 2)
        require_dtype("blockTable", table, (torch.int32,))
        require_contiguous(blockTable=table)
        problem.extent = table.shape[1] * problem.block_size
    else:
        problem.extent = _dense_keys(layout, problem.key, batch, key_heads, width)
    problem.key_heads, problem.width, problem.batch, problem.span = key_heads, width, batch, span
    if not tnd and span == 1:
        # FusedInfer: at Q_S = 1 sparse_mode, pre_tokens and next_tokens have no effect; inner_precise is 0 or 1.
        problem.sparse_mode, problem.before, problem.after = DEFAULT, UNBOUNDED, UNBOUNDED
    if problem.sparse_mode == DEFAULT and problem.mask is None:
        problem.before = problem.after = UNBOUNDED
    _check_mask(problem)
    shape = problem.query.shape
    if layout == "BNSD_BSND":
        shape = (shape[0], shape[2], shape[1], shape[3])
    require_shape("attentionOut", problem.out, shape)
    return problem


def lengths_of(
    problem: Problem, actual: tuple[int, ...] | None, actual_keys: tuple[int, ...] | None, limits: Limits
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The queries and the keys of each sequence of a planned problem, with all that documents demand of the lists."""
    table, span, batch = problem.block_table, problem.span, problem.batch
    tnd = problem.layout == "TND"
    if tnd:
        rows = _cumulative("actualSeqLengths", actual, span)
        batch = len(rows)
        if batch > limits.batch:
            raise tiling(f"the batch must not exceed {limits.batch}, but is {batch}.")
    else:
        # FusedInfer, decode: actual_seq_lengths has no effect at Q_S = 1.
        rows = _lengths("actualSeqLengths", None if span == 1 else actual, batch, span)
    if table is not None:
        if not actual_keys:
            raise tiling("actualSeqLengthsKv must be given with a blockTable.")
        keys = _lengths("actualSeqLengthsKv", actual_keys, batch, problem.extent)
        _check_table(table, problem.key, problem.block_size, keys)
    elif tnd:
        keys = _cumulative("actualSeqLengthsKv", actual_keys, problem.extent)
        if len(keys) != batch:
            raise invalid(f"actualSeqLengths and actualSeqLengthsKv name {batch} and {len(keys)} sequences.")
    else:
        keys = _lengths("actualSeqLengthsKv", actual_keys, batch, problem.extent)
    most = max(keys, default=0)
    if most > limits.keys:
        raise tiling(f"KV_S must not exceed {limits.keys}, but is {most}.")
    if problem.mask is not None and problem.sparse_mode < 2:
        columns = most if table is None else -(-most // problem.block_size) * problem.block_size
        _check_cover(problem.mask, span, columns, batch)
    return rows, keys
