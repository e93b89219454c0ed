"""Compiles two kernels through the kernel cache for a GPU that is not there: ``python -m tests.cuda.cached``.

Prints what the cache counted, as JSON.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from polyaccel_cuda.kernel_cache import install
from polyaccel_cuda.kernels import norm
from tests.cuda.compiled import Absent

DEVICE = "NVIDIA H100 80GB HBM3"


def main() -> None:
    cache = install("cuda", [DEVICE])
    assert cache is not None
    run = JITFunction.run

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **{**kwargs, "warmup": True})

    triton.runtime.driver.set_active(Absent(90))
    x, weight = torch.zeros(4, 64), torch.zeros(64)
    with mock.patch.object(JITFunction, "run", compiled):
        norm.rms_norm(x, weight, 1e-5)
        norm.layer_norm(x, weight, weight, 1e-5)
    cache.folder.close()
    print(json.dumps({"hits": cache.hits, "compiled": cache.compiled, "report": cache.report()}))


if __name__ == "__main__":
    main()
