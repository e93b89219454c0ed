"""Compiles the kernels of a decode step for early launches, on no GPU: ``python -m tests.cuda.early_compiled``.

Prints one line of JSON a kernel: its name, whether it is launched early, and the order of what matters in its PTX.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from polyaccel.backend import RopeTable
from polyaccel_cuda.kernels import activation, decode, early, expand, few, norm, reduce_norm, rope
from polyaccel_cuda.kernels.one_shot import one_shot_all_reduce
from tests.cuda.compiled import Absent, units

GLOBAL = re.compile(r"griddepcontrol\.\w+|(?:ld|st|atom|red)\.(?:\w+\.)*global|cp\.async\S*global")


def calls(tokens: int) -> None:
    """Every kernel of a decode step."""

    def empty(*shape: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    ids, numbers = empty(128, kind=torch.int64), empty(4096, kind=torch.int32)
    few.few_rows(empty(tokens, 256), empty(128, 256), 96, None, numbers, 8, 3)
    norm.rms_norm(empty(tokens, 96), empty(96), 1e-5, empty(tokens, 96))
    activation.silu_and_mul(empty(tokens, 96), 48)
    table = RopeTable(cos=torch.zeros(8, 32), sin=torch.zeros(8, 32), rotary_dim=64)
    cache, norms = (empty(16, 2, 16, 64), empty(16, 2, 16, 64)), (None, None, 1e-5)
    rope.rope_cache(empty(tokens, 512), (4, 2, 64), table, norms, cache, ids, ids)
    for streamed in (False, True):
        adapters, turned = units(empty(32, 96), 16, tokens, streamed), units(empty(32, 512), 16, tokens, streamed)
        activation.silu_and_mul(empty(tokens, 96), 48, empty(tokens, 96), adapters)
        expand.expand(empty(tokens, 96), empty(tokens, 96), (0, 96), adapters, empty(tokens, 96))
        rope.rope_cache(empty(tokens, 512), (4, 2, 64), table, norms, cache, ids, ids, empty(tokens, 96), turned)
    q, out = empty(tokens, 4, 64), empty(tokens, 4, 64)
    decode.decode(q, cache, numbers, numbers[:8], numbers[:8], 0.1, None, 4, out)
    peers, rounds, stop = (1 << 20, 2 << 20), empty(256, kind=torch.int64), empty(1, kind=torch.int32)
    one_shot_all_reduce(empty(tokens, 96), 0, peers, rounds, stop)
    reduce_norm.reduce_add_norm(empty(tokens, 96), empty(tokens, 96), empty(96), 1e-5, 0, peers, 0, rounds, stop)


def main() -> None:
    triton.runtime.driver.set_active(Absent(90))
    run: Callable[..., Any] = JITFunction.run

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        line = {
            "kernel": self.__name__,
            "tokens": tokens,
            "asked": kwargs["EARLY"],
            "early": bool(kernel.metadata.launch_pdl),
            "warps": kernel.metadata.num_warps,
            "shared_reads": kernel.asm["ptx"].count("ld.shared"),
            "order": GLOBAL.findall(kernel.asm["ptx"]),
        }
        print(json.dumps(line), flush=True)
        return kernel

    with mock.patch.object(JITFunction, "run", compiled):
        for tokens in (1, 8, 32):
            for can in (True, False):
                with early.early_launches(can):
                    calls(tokens)


if __name__ == "__main__":
    main()
