"""Operators on one card: what is right, what is refused, what is copied."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import DeviceLost, OperatorError, Slice, WeightSpec
from polyaccel.backend.composite import dense
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.device import NpuDevice

HALVES = st.sampled_from([torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["dense", "transposed", "rows", "offset"])


def laid_out(x: torch.Tensor, layout: str, device: torch.device) -> torch.Tensor:
    """``x: [rows, width]`` on the device in another layout."""
    if layout == "transposed":
        return x.t().contiguous().to(device).t()
    if layout == "rows":
        return torch.cat((x, x), 1).to(device)[:, : x.shape[1]]
    if layout == "offset":
        return torch.cat((x, x)).to(device)[len(x) :]
    return x.to(device)


@given(rows=st.integers(1, 9), width=st.integers(1, 70), dtype=HALVES, layout=LAYOUTS, seed=st.integers(0, 99))
@settings(max_examples=25)
def test_every_layout_of_a_norms_operands_is_taken_and_its_copies_are_counted(
    rows: int, width: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    backend = NpuBackend()
    device = backend.devices()[0]
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)
    given_ = laid_out(x, layout, device.torch_device)
    norm = backend.table()["rms_norm"][0].fn
    normed, total = norm(given_, device.upload(weight), 1e-5, device.upload(residual))
    wanted, wanted_total = dense.rms_norm(x, weight, 1e-5, residual)
    device.synchronize()
    assert torch.equal(total.cpu(), wanted_total)
    assert torch.allclose(normed.cpu().float(), wanted.float(), rtol=2**-6, atol=1e-3)
    strided = not given_.is_contiguous()
    assert backend.ledger.copies() == ({"copy.rms_norm.x": 1} if strided else {})


@given(
    rows=st.integers(0, 6),
    k=st.integers(0, 40),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    bias=st.booleans(),
    layout=LAYOUTS,
)
@settings(max_examples=25)
def test_a_product_takes_every_shape_and_layout_and_keeps_no_transposed_weight(
    rows: int, k: int, widths: list[int], bias: bool, layout: str
) -> None:
    backend = NpuBackend()
    device = backend.devices()[0]
    slices = tuple(Slice(name=str(i), n=n) for i, n in enumerate(widths))
    spec = WeightSpec(site="s", slices=slices, k=k, dtype=torch.float16, bias=bias)
    weight = backend.allocate_weight(spec, device)
    generator = torch.Generator().manual_seed(k)
    matrix = torch.randn(spec.n, k, generator=generator).half()
    for i, part in enumerate(slices):
        weight.write(i, matrix[spec.starts[i] : spec.starts[i + 1]])
        if bias:
            weight.write_bias(i, torch.full((part.n,), 2.0))
    weight.seal()
    held = weight.nbytes
    x = torch.randn(rows, k, generator=generator).half()
    y = backend.table()["linear"][0].fn(laid_out(x, layout, device.torch_device), weight)
    wanted = x.float() @ matrix.float().t() + (2.0 if bias else 0.0)
    assert torch.allclose(y.cpu().float(), wanted, rtol=2e-3, atol=2e-2)
    assert weight.nbytes == held
    strided = not laid_out(x, layout, torch.device("cpu")).is_contiguous()
    assert len(backend.ledger.copies()) == int(rows > 0 and k > 0 and strided)


def test_an_operand_on_the_host_is_refused_by_name(backend: NpuBackend, device: NpuDevice) -> None:
    norm = backend.table()["rms_norm"][0].fn
    with pytest.raises(OperatorError, match=r"weight is on cpu but x is on npu:0"):
        norm(device.upload(torch.ones(2, 8)), torch.ones(8), 1e-5)


STRIDED = """
import torch, polyaccel_npu.runtime as runtime
from polyaccel.backend import DeviceLost, OperatorError
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.replay import group_of_one
backend = NpuBackend(blame={blame})
device = backend.devices()[0]
group, hcom = group_of_one(device.torch_device)
x = device.upload(torch.ones(8, 4).half())
w = device.upload(torch.ones(16, 8).half())
issue, fused = backend._issuer.issue, runtime.ops().npu_mm_all_reduce_base
try:
    issue("mm_all_reduce_base", {{"x1": x.t(), "x2": w.t()}}, fused, x.t(), w.t(), hcom)
    device.synchronize()
except (DeviceLost, OperatorError) as error:
    print(type(error).__name__, str(error).replace(chr(10), " | "))
try:
    y = backend.table()["rms_norm"][0].fn(device.upload(torch.ones(2, 8)), device.upload(torch.ones(8)), 1e-5)
    device.synchronize()
    print("NUMBERS", y.cpu().tolist())
except DeviceLost as error:
    print("AGAIN", type(error).__name__)
"""


WORDS = ("DeviceLost", "OperatorError", "AGAIN", "NUMBERS")


def run_child(script: str, **environment: str) -> list[str]:
    """Each expected failure has its own process: its queue is worth nothing afterwards."""
    import os

    child = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [line for line in child.stdout.splitlines() if line.startswith(WORDS)]


def test_a_strided_x1_is_refused_as_cann_refuses_it_and_no_numbers_follow() -> None:
    first, second = run_child(STRIDED.format(blame=False), ASCEND_LAUNCH_BLOCKING="0", TASK_QUEUE_ENABLE="1")
    assert first.startswith(DeviceLost.__name__)
    assert "aclnnMatmulAllReduce" in first
    assert second == f"AGAIN {DeviceLost.__name__}"


def test_blame_names_the_call_its_strides_and_its_contiguity() -> None:
    first, _ = run_child(STRIDED.format(blame=True), ASCEND_LAUNCH_BLOCKING="0", TASK_QUEUE_ENABLE="1")
    assert "npu.mm_all_reduce_base" in first
    assert "float16[4, 8] stride [1, 4] on npu:0, non-contiguous" in first
