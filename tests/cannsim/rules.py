"""Operators of the tests' own, so that the runtime is tested without the operator table: ``CANNSIM_RULES``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from polyaccel_cannsim.descriptor import AclTensor
from polyaccel_cannsim.errors import Refused, Status
from polyaccel_cannsim.registry import Compute, Launch, aclnn

SOURCE = "tests/cannsim/rules.py"


def store(target: AclTensor, value: Callable[[], torch.Tensor]) -> Compute:
    """What writes the value, taken when it runs."""

    def compute() -> None:
        target.tensor().copy_(value())

    return compute


@aclnn("aclnnRmsNorm", "2*tensor double 2*tensor", source=SOURCE)
def rms_norm(x: AclTensor, gamma: AclTensor, epsilon: float, y: AclTensor, rstd: AclTensor) -> Compute:
    """Refused in phase 1 for a gamma of another width."""
    if gamma.shape != x.shape[-1:]:
        raise Refused(Status.BAD_PARAMETER, f"gamma {list(gamma.shape)} for x {list(x.shape)}", "EZ1001")

    def compute() -> None:
        values = x.tensor().float()
        scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
        rstd.tensor().copy_(scale)
        y.tensor().copy_(values * scale * gamma.tensor().float())

    return compute


@aclnn("aclnnMatmulAllReduce", "3*tensor string string 2*int64 tensor", source=SOURCE)
def matmul_all_reduce(
    x1: AclTensor,
    x2: AclTensor,
    bias: AclTensor | None,
    group: str,
    operation: str,
    turn: int,
    mode: int,
    out: AclTensor,
) -> Launch:
    """Refused at phase 2 for a strided x1."""

    def check() -> None:
        if not x1.contiguous:
            raise Refused(Status.INNER, "Op MatmulAllReduce has 1 uncontiguous input, but set 0 auto conversion")

    return Launch(check, store(out, lambda: x1.tensor().float() @ x2.tensor().float()))


@aclnn("aclnnSwiGlu", "tensor int64 tensor", source=SOURCE)
def swiglu(x: AclTensor, dim: int, out: AclTensor) -> Compute:
    """Fails while it runs."""

    def compute() -> None:
        raise Refused(Status.DEVICE_FAULT, "The aicore execution is abnormal")

    return compute


@aclnn("aclnnInplaceCopy", "2*tensor", source=SOURCE)
def inplace_copy(target: AclTensor, source: AclTensor) -> Compute:
    return store(target, lambda: source.tensor())


@aclnn("aclnnCast", "tensor dtype tensor", source=SOURCE)
def cast(source: AclTensor, dtype: torch.dtype, target: AclTensor) -> Compute:
    return store(target, lambda: source.tensor())


@aclnn("aclnnSilu", "2*tensor", source=SOURCE, since="8.2.RC1")
def silu(x: AclTensor, out: AclTensor) -> Compute:
    """Exported by newer versions only."""
    return store(out, lambda: torch.nn.functional.silu(x.tensor().float()))
