"""Wrong attention and KV caches. A wrong step or window is given to the host's own operator where that is enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from polyaccel.backend import Step, StepInput, TorchDevice
from polyaccel.backend.cpu.step import CpuStep
from polyaccel_conformance.mutants.mutant import Function, Mutant, mutant

Tensor = torch.Tensor


def restep(step: Step, inputs: StepInput) -> Step:
    """A step of the CPU backend with other inputs."""
    return CpuStep(inputs, step.state, TorchDevice("cpu"))


def _window(fn: Function) -> Function:
    def paged_attention(q: Tensor, kv: Any, layer: int, step: Step, scale: float, window: int | None = None) -> Tensor:
        y: Tensor = fn(q, kv, layer, step, scale, window + 1 if window is not None and window > 1 else window)
        return y

    return paged_attention


def _contexts(edit: Any) -> Any:
    """The host's attention over other context lengths."""

    def wrap(fn: Function) -> Function:
        def paged_attention(
            q: Tensor, kv: Any, layer: int, step: Step, scale: float, window: int | None = None
        ) -> Tensor:
            lengths = step.input.context_lengths
            queries = np.diff(step.input.query_starts)
            changed = edit(lengths.copy(), queries, kv.spec.block_size)
            if np.array_equal(changed, lengths):
                return fn(q, kv, layer, step, scale, window)  # type: ignore[no-any-return]
            other = restep(step, replace(step.input, context_lengths=changed.astype(np.int32)))
            return fn(q, kv, layer, other, scale, window)  # type: ignore[no-any-return]

        return paged_attention

    return wrap


def _last_block(lengths: Any, queries: Any, size: int) -> Any:
    rest = lengths % size
    skip = (rest > 0) & (rest < 8) & (lengths > size) & (queries == 1)
    return np.where(skip, lengths - rest, lengths)


def _tables(fn: Function) -> Function:
    def paged_attention(q: Tensor, kv: Any, layer: int, step: Step, scale: float, window: int | None = None) -> Tensor:
        """The blocks of a sequence are taken to be consecutive."""
        inputs = step.input
        tables = inputs.block_tables.copy()
        for row, length in enumerate(inputs.context_lengths):
            used = -(-int(length) // kv.spec.block_size)
            run = tables[row, 0] + np.arange(used)
            if used and run[-1] < kv.spec.blocks:
                tables[row, :used] = run
        if np.array_equal(tables, inputs.block_tables):
            return fn(q, kv, layer, step, scale, window)  # type: ignore[no-any-return]
        other = restep(step, replace(inputs, block_tables=tables))
        return fn(q, kv, layer, other, scale, window)  # type: ignore[no-any-return]

    return paged_attention


def _low_probabilities(fn: Function) -> Function:
    def paged_attention(q: Tensor, kv: Any, layer: int, step: Step, scale: float, window: int | None = None) -> Tensor:
        """Queries are rounded to 8 bits first, as scores in low precision would be."""
        low = q.bfloat16().to(q.dtype) if q.dtype == torch.float32 else q
        y: Tensor = fn(low, kv, layer, step, scale, window)
        return y

    return paged_attention


def _group(fn: Function) -> Function:
    def paged_attention(q: Tensor, kv: Any, layer: int, step: Step, scale: float, window: int | None = None) -> Tensor:
        """Query head h uses key head h mod kv_heads."""
        heads, kv_heads = q.shape[1], kv.spec.kv_heads
        order = torch.arange(heads).view(-1, kv_heads).t().reshape(-1)
        y: Tensor = fn(q[:, order].contiguous(), kv, layer, step, scale, window)
        back = torch.empty_like(y)
        back[:, order] = y
        return back

    return paged_attention


def _first_layer(fn: Function) -> Function:
    def paged_attention(q: Tensor, kv: Any, layer: int, step: Step, scale: float, window: int | None = None) -> Tensor:
        y: Tensor = fn(q, kv, 0 if layer == 2 else layer, step, scale, window)
        return y

    return paged_attention


def _not_causal(fn: Function) -> Function:
    def dense_attention(q: Tensor, k: Tensor, v: Tensor, starts: Any, scale: float, causal: bool = True) -> Tensor:
        y: Tensor = fn(q, k, v, starts, scale, False)
        return y

    return dense_attention


def _stores_padding(fn: Function) -> Function:
    def write_kv_cache(k: Tensor, v: Tensor, kv: Any, layer: int, step: Step) -> None:
        """A token with slot -1 is stored in the last slot."""
        fn(k, v, kv, layer, step)
        unstored = np.flatnonzero(step.input.kv_slots == -1)
        if len(unstored):
            last = kv.spec.blocks * kv.spec.block_size - 1
            kv.write(layer, torch.tensor([last]), k[unstored[:1]].contiguous(), v[unstored[:1]].contiguous())

    return write_kv_cache


def _keys_for_values(fn: Function) -> Function:
    def write_kv_cache(k: Tensor, v: Tensor, kv: Any, layer: int, step: Step) -> None:
        fn(k, k if k.shape[1] == 8 else v, kv, layer, step)

    return write_kv_cache


def _last_slot_lost(fn: Function) -> Function:
    def write_kv_cache(k: Tensor, v: Tensor, kv: Any, layer: int, step: Step) -> None:
        """The very last slot of the cache is never written."""
        last = torch.tensor([kv.spec.blocks * kv.spec.block_size - 1])
        before = [part.clone() for part in kv.read(layer, last)]
        fn(k, v, kv, layer, step)
        kv.write(layer, last, *before)

    return write_kv_cache


def _one_key(fn: Function) -> Function:
    def dense_attention(q: Tensor, k: Tensor, v: Tensor, starts: Any, scale: float, causal: bool = True) -> Tensor:
        """The last of 16 m + 1 rows sees nothing."""
        y: Tensor = fn(q, k, v, starts, scale, causal)
        if len(q) % 16 != 1 or len(q) < 17:
            return y
        return torch.cat((y[:-1], torch.zeros_like(y[-1:])))

    return dense_attention


SEQUENCES: tuple[Mutant, ...] = (
    mutant("attention.window_plus_one", "A window sees one key too many.", "values.exact", paged_attention=_window),
    mutant(
        "attention.last_block_skipped",
        "In decode a last block with up to seven tokens is not read.",
        "values.bound",
        paged_attention=_contexts(_last_block),
    ),
    mutant(
        "attention.consecutive_blocks",
        "Block tables are ignored after the first entry.",
        "values.bound",
        paged_attention=_tables,
    ),
    mutant(
        "attention.low_scores",
        "float32 queries are rounded to bfloat16.",
        "values.bound",
        paged_attention=_low_probabilities,
    ),
    mutant(
        "attention.group_by_modulus",
        "Query head h uses key head h mod kv_heads.",
        "values.bound",
        paged_attention=_group,
    ),
    mutant(
        "attention.third_layer",
        "The third layer reads the first one's cache.",
        "values.bound",
        paged_attention=_first_layer,
    ),
    mutant("dense_attention.never_causal", "The causal mask is ignored.", "values.exact", dense_attention=_not_causal),
    mutant(
        "dense_attention.last_of_17",
        "The last of 16 m + 1 rows is zero.",
        "values.bound",
        narrow=True,
        dense_attention=_one_key,
    ),
    mutant(
        "kv_cache.last_slot_lost",
        "The last slot of the cache is never written.",
        "values.exact",
        write_kv_cache=_last_slot_lost,
    ),
    mutant(
        "kv_cache.padding_stored",
        "A token with slot -1 overwrites the last slot.",
        "memory.inputs",
        write_kv_cache=_stores_padding,
    ),
    mutant(
        "kv_cache.keys_for_values",
        "With eight heads the keys are stored as values too.",
        "values.exact",
        write_kv_cache=_keys_for_values,
    ),
)
