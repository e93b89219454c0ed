"""Compiles the sum over ranks for GPUs that need not be there: ``python -m tests.cuda.one_shot_compiled``."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from polyaccel_cuda.kernels import one_shot
from tests.cuda.compiled import Absent

SOMEWHERE = 1 << 45


def main() -> None:
    """Prints, by GPU and world size, how the numbers of peers are read and the flags set."""
    run = JITFunction.run
    made: list[Any] = []

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(run(self, *args, **{**kwargs, "warmup": True}))
        return made[-1]

    rounds, given_up = torch.zeros(one_shot.PROGRAMS, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    for capability, world, dtype in ((80, 2, torch.float16), (90, 2, torch.bfloat16), (90, 8, torch.float32)):
        triton.runtime.driver.set_active(Absent(capability))
        peers = tuple(SOMEWHERE + one_shot.BUFFER_BYTES * rank for rank in range(world))
        with mock.patch.object(JITFunction, "run", compiled):
            one_shot.one_shot_all_reduce(torch.zeros(4096, dtype=dtype), 1, peers, rounds, given_up)
        ptx = made[-1].asm["ptx"]
        wide, fence = ptx.count("ld.volatile.global.v4.b32"), "atom.global.sys.acq_rel.add.u64"
        flags = ptx[ptx.index(fence) :].split("ld.volatile", 1)[0].count("st.global.b64")
        print(f"sm_{capability} of {world}: {wide} wide reads of peers, {flags} flags", flush=True)


if __name__ == "__main__":
    main()
