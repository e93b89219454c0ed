"""Compiles the kernels that exchange data for GPUs that need not be there: ``-m tests.cuda.exchange_compiled``."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from polyaccel_cuda.kernels import pushed, reduce_norm, two_shot
from tests.cuda.compiled import Absent

SOMEWHERE = 1 << 45


def main() -> None:
    """Prints, by GPU and world size, how each kernel stores to peers or reads from them, its flags and registers."""
    run = JITFunction.run
    made: list[Any] = []

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(run(self, *args, **{**kwargs, "warmup": True}))
        return made[-1]

    rounds, given_up = torch.zeros(128, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)

    def said(who: str, what: str) -> None:
        ptx = made[-1].asm["ptx"]
        wide = ptx.count("ld.volatile.global.v4.b32")
        pushes, flags = ptx.count("st.global.v4.b32"), ptx.count("atom.global.sys.release.add.u64")
        print(f"{who} {what}: {wide} wide reads, {pushes} wide stores, {flags} flags", flush=True)

    for capability, world, dtype in ((80, 2, torch.float16), (90, 2, torch.bfloat16), (90, 8, torch.bfloat16)):
        triton.runtime.driver.set_active(Absent(capability))
        who = f"sm_{capability} of {world}"
        peers = tuple(SOMEWHERE + (1 << 28) * rank for rank in range(world))
        with mock.patch.object(JITFunction, "run", compiled):
            x = torch.zeros(1, 4096, dtype=dtype)
            reduce_norm.reduce_add_norm(x, x, x[0], 1e-5, 1, peers, 4096, rounds, given_up)
            said(who, "reduce_add_norm")
            two_shot.two_shot_all_reduce(torch.zeros(1 << 16, dtype=dtype), 1, peers, 8192, rounds, given_up)
            said(who, "two_shot")
            pushed.meet(1, peers, 8192, rounds, given_up)
            said(who, "meet")
            pushed.add_received(torch.zeros(1 << 16, dtype=dtype), torch.zeros(1 << 16, dtype=dtype))
            said(who, "add_received")


if __name__ == "__main__":
    main()
