"""Nothing that the backend runs is one of those operators that torch_npu has not and computes on the host, with a copy
there and back; masks are made once, on the host, and stay on the card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyaccel_npu.attention import TRIANGLE, Attention
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.device import NpuDevice
from tests.npu.tiny import write, write_adapter

FORBIDDEN = "TORCH_NPU_FALLBACK_CPU_DISABLE"
"""torch_npu raises where it would fall back."""
PROGRAM = """
import sys
import torch, torch_npu
from polyaccel import LLM, SamplingParams

try:
    torch.digamma(torch.ones(3).npu())
    print("CONTROL fell back")
except RuntimeError as error:
    print("CONTROL", str(error).splitlines()[0])
with LLM(sys.argv[1], backend="npu", dtype=sys.argv[3], max_model_len=256, max_num_seqs=4, kv_cache_bytes=16 << 20,
         executor="inline", graphs=False, adapters={"own": sys.argv[2]}) as llm:
    greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    drawn = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, max_tokens=3, repetition_penalty=1.2,
                           presence_penalty=0.5, frequency_penalty=0.5, logit_bias={7: -4.0}, logprobs=3, seed=5,
                           ignore_eos=True)
    prompts, adapters = [[5, 9, 3], [7] * 20, [4, 4]], [None, "own", {"own": 0.5}]
    for params in (greedy, drawn):
        print("ANSWER", [len(one.token_ids) for one in llm.generate(prompts, params, adapter=adapters)])
    print("COMPOSITES", sorted(llm.explain().composites()))
"""


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_step_of_a_model_falls_back_to_the_host(dtype: str, tmp_path: Path) -> None:
    """float32 runs attention as a composite, in plain operators of torch."""
    model, adapter = write(tmp_path / "model"), write_adapter(tmp_path / "adapter", 5)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(adapter), dtype],
        env={**os.environ, FORBIDDEN: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("CONTROL", "ANSWER", "COMPOSITES"))]
    control, *answers, composites = lines
    assert "CPU fallback is disabled" in control
    assert answers == ["ANSWER [3, 3, 3]"] * 2
    assert ("paged_attention" in composites) == (dtype == "float32")


class OnTheCard(TorchDispatchMode):
    """Operators that were called with a tensor of a card or made one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "npu" for x in tensors):
            self.names.append(func.overloadpacket.__name__)
        return result


def test_the_triangle_is_made_on_the_host_once_whatever_torchs_default_device_is(
    backend: NpuBackend, device: NpuDevice
) -> None:
    attention = Attention(backend._issuer)
    with torch.device(device.torch_device), OnTheCard() as seen:
        mask = attention._triangle(device.torch_device)
        again = attention._triangle(device.torch_device)
    assert again is mask
    assert set(seen.names) <= {"_to_copy", "copy_", "empty_strided", "empty"}, seen.names
    assert seen.names, "the copy itself was not seen"
    device.synchronize()
    host = mask.cpu()
    assert (tuple(host.shape), host.dtype, mask.device) == ((TRIANGLE, TRIANGLE), torch.bool, device.torch_device)
    assert int(host.sum()) == TRIANGLE * (TRIANGLE - 1) // 2
    assert bool(host[0, 1])
    assert not bool(host[1, 0])
    assert not bool(host[5, 5])
