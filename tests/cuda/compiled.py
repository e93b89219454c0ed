"""Compiles every kernel for GPUs that need not be there: ``python -m tests.cuda.compiled [Hopper:bfloat16 ...]``.

The interpreter takes much that the compiler refuses: a name that changes its type in a loop, a tuple as an argument.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from polyaccel.backend import RopeTable
from polyaccel_cuda.kernels import activation, decode, expand, few, gather, norm, prefill, rope, rotary, sample, shrink
from polyaccel_cuda.kernels.rows import Units

TARGETS = {"Ampere": 80, "Hopper": 90}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Absent:
    """A driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def units(b: torch.Tensor, rows: int, most: int, streamed: bool) -> Units:
    numbers = torch.zeros(4096, dtype=torch.int32)
    tables = dict.fromkeys(("seats", "members", "first", "place", "rank", "more"), numbers)
    return Units(b=b, rows=rows, most=most, streamed=streamed, mix=torch.zeros(4096), **tables)


def calls(dtype: torch.dtype) -> Iterator[str]:
    """Make every kernel's calls, decode's and prefill's, and say which."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    ids = empty(128, kind=torch.int64)
    numbers = empty(4096, kind=torch.int32)
    table = RopeTable(cos=torch.zeros(8, 32), sin=torch.zeros(8, 32), rotary_dim=64)
    for tokens in (1, 8, 32, 64):
        for listed in (None, numbers):
            for k, bias in ((256, empty(96)), (100, None)):
                few.few_rows(empty(tokens, k), empty(128, k), 96, bias, listed, 8 if listed is not None else 0, 3)
    yield "few_rows"
    for rows, most, streamed in ((16, 1, False), (16, 64, True), (16, 4096, False), (64, 3, False)):
        h = empty(128, 96)
        for residual in (None, empty(128, 96)):
            expand.expand(empty(128, 96), h, (0, 64, 96), units(empty(32, 96), rows, most, streamed), residual)
        activation.silu_and_mul(empty(128, 96), 48, h, units(empty(32, 96), rows, most, streamed))
        gather.embedding(empty(50, 96), ids, 0, empty(50, 32), units(empty(32, 96), rows, most, streamed))
        for turns, norms in ((64, None), (48, empty(64))):
            turned = RopeTable(cos=table.cos, sin=table.sin, rotary_dim=turns)
            cache = (empty(4, 2, 16, 64), empty(4, 2, 16, 64))
            rope.rope_cache(
                empty(128, 512),
                (4, 2, 64),
                turned,
                (norms, norms, 1e-5),
                cache,
                ids,
                ids,
                empty(128, 96),
                units(empty(32, 512), rows, most, streamed),
            )
            rope.rope_cache(empty(128, 512), (4, 2, 64), turned, (norms, norms, 1e-5), cache, ids, ids)
    sole, cache = units(empty(32, 512), 16, 1, False), (empty(4, 2, 16, 64), empty(4, 2, 16, 64))
    expand.expand(empty(1, 96), empty(1, 96), (0, 64, 96), sole, empty(1, 96))
    activation.silu_and_mul(empty(1, 96), 48, empty(1, 96), sole)
    for turns, norms in ((64, None), (48, empty(64))):
        turned = RopeTable(cos=table.cos, sin=table.sin, rotary_dim=turns)
        heads, scaled = (4, 2, 64), (norms, norms, 1e-5)
        rope.rope_cache(empty(1, 512), heads, turned, scaled, cache, ids, ids, empty(1, 96), sole)
    for largest, mixed in ((16, False), (70, True)):
        tiled = replace(units(empty(32, 96), 64, 3, False), largest=largest, mixed=mixed)
        for slices, residual in ((1, empty(128, 96)), (3, None)):
            starts = (0, 96) if slices == 1 else (0, 64, 80, 96)
            h = shrink.shrink(empty(128, 128), empty(512, 128), slices, 16, tiled)
            expand.expand(empty(128, 96), h, starts, tiled, residual)
        activation.silu_and_mul(empty(128, 96), 48, empty(128, 96), tiled)
    yield "adapters"
    activation.silu_and_mul(empty(128, 96), 48)
    activation.gelu(empty(128, 96), "tanh")
    activation.gelu(empty(128, 96), "none")
    gather.embedding(empty(50, 96), ids, 0)
    norm.rms_norm(empty(128, 96), empty(96), 1e-5, empty(128, 96))
    norm.rms_norm(empty(2, 40000), empty(40000), 1e-5)
    norm.layer_norm(empty(128, 96), empty(96), empty(96), 1e-5)
    rotary.rotate(empty(128, 4, 64), table, ids)
    yield "rows"
    cache = (empty(16, 2, 16, 64), empty(16, 2, 16, 64))
    rotary.write_kv(empty(128, 2, 64), empty(128, 2, 64), cache, ids)
    for window in (None, 32):
        for splits in (1, 4):
            q, out = empty(8, 4, 64), empty(8, 4, 64)
            decode.decode(q, cache, numbers, numbers[:8], numbers[:8], 0.1, window, splits, out)
        tiles = (numbers[:4], numbers[:4])
        out = empty(128, 4, 64)
        prefill.prefill(empty(128, 4, 64), cache, numbers, numbers, numbers, numbers, tiles, 0.1, window, out)
    yield "attention"
    scores, floats, bytes_ = empty(8, 300), empty(800, kind=torch.float32), empty(8, 300, kind=torch.uint8)
    for sampling, ordering in ((False, False), (True, False), (True, True)):
        sample.sample_kernel[(8,)](
            scores, 300, 300, numbers, floats, floats, ids, ids, numbers, SAMPLING=sampling, ORDERING=ordering,
            COUNTS=ordering, RAW=True, BITS=sample.KEY_BITS[dtype], BLOCK=sample.BLOCK, num_warps=sample.WARPS,
        )  # fmt: skip
    sample.top_scores_kernel[(8,)](
        scores, 300, 300, ids, floats, floats, ids, floats, 20, 20, RAW=True, BLOCK=sample.BLOCK,
        num_warps=sample.WARPS,
    )  # fmt: skip
    sample.adjust_scores_kernel[(8, 1)](
        scores, 300, floats, 300, numbers, floats, numbers, bytes_, floats, bytes_, PENALTIES=True, BIAS=True,
        MASK=True, BLOCK=sample.ADJUSTED_BLOCK,
    )  # fmt: skip
    yield "sampling"


def main(chosen: Sequence[str]) -> None:
    """``chosen``: targets and dtypes, all without any."""
    run = JITFunction.run

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **{**kwargs, "warmup": True})

    for name in chosen or [f"{target}:{str(dtype).removeprefix('torch.')}" for target in TARGETS for dtype in DTYPES]:
        target, _, dtype = name.partition(":")
        triton.runtime.driver.set_active(Absent(TARGETS[target]))
        with mock.patch.object(JITFunction, "run", compiled):
            for what in calls(getattr(torch, dtype)):
                print(f"{name} {what}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
