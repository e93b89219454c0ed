"""Matrix product fused with a collective (MC2): MatmulAllReduce and V2, MatmulReduceScatter, AllGatherMatmul.

"AllReduce", "ReduceScatter", "AllGather" below: hicann/ops-transformer mc2/matmul_all_reduce/docs/
aclnnMatmulAllReduce.md and ...V2.md, mc2/matmul_reduce_scatter/docs/aclnnMatmulReduceScatter.md,
mc2/all_gather_matmul/docs/aclnnAllGatherMatmul.md, sections "parameters" and "constraints". "Base" is Ascend/op-plugin
docs/zh/custom_APIs/torch_npu/torch_npu-npu_mm_all_reduce_base.md.

Every rank's partial result is rounded nowhere: products and sums are float32, the output is rounded once. The order in
which ranks are added is gloo's, as on a card it is HCCL's.
"""

from __future__ import annotations

import torch

from .collective_rules import (
    ALL_REDUCE_RANKS,
    INT_MAX,
    K_HIGH,
    K_LOW,
    MESH_RANKS,
    check_chip,
    check_modes,
    check_ranks,
    check_x2,
    uncontiguous,
)
from .descriptor import (
    HALF,
    Tensor,
    is_transposed,
    require,
    require_dtype,
    require_plain,
    require_rank,
    require_same_dtype,
    require_shape,
    store,
    wide,
)
from .environment import CHIP_910B, Environment
from .operator import Launch, aclnn
from .refusal import inner, invalid

ALL_REDUCE = "hicann/ops-transformer mc2/matmul_all_reduce/docs/aclnnMatmulAllReduce.md"
ALL_REDUCE_V2 = "hicann/ops-transformer mc2/matmul_all_reduce/docs/aclnnMatmulAllReduceV2.md"
REDUCE_SCATTER = "hicann/ops-transformer mc2/matmul_reduce_scatter/docs/aclnnMatmulReduceScatter.md"
ALL_GATHER = "hicann/ops-transformer mc2/all_gather_matmul/docs/aclnnAllGatherMatmul.md"


def _all_reduce(
    environment: Environment,
    function: str,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    x3: Tensor | None,
    group: str | None,
    reduce_op: str | None,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
) -> Launch:
    check_chip(environment, function, (CHIP_910B,))  # AllReduce, products: not A3, nothing below A2
    require(x1=x1, x2=x2, output=out)
    require_plain(x1=x1, x2=x2, output=out)
    for name, tensor in (("x1", x1), ("x2", x2), ("bias", bias), ("x3", x3), ("output", out)):
        require_dtype(name, tensor, HALF)
    require_same_dtype(x1=x1, x2=x2, bias=bias, x3=x3, output=out)
    check_modes(reduce_op or "", comm_turn, stream_mode)
    require_rank("x1", x1, 2, 3)
    require_rank("x2", x2, 2, 2)
    require_rank("bias", bias, 1, 1)
    if 0 in x1.shape or 0 in x2.shape:
        raise invalid("x1 and x2 must not be empty tensors.")  # Base, constraints on A2
    if x1.shape[-1] != x2.shape[0]:
        raise invalid(f"Expected k of x1 and x2 to be equal, but got {x1.shape[-1]} and {x2.shape[0]}.")
    rows = torch.Size(x1.shape[:-1]).numel()
    if max(rows, x1.shape[-1], x2.shape[1]) > INT_MAX:
        raise invalid(f"b*s, m, k and n must not exceed {INT_MAX}.")
    check_x2(x2)
    shape = (*x1.shape[:-1], x2.shape[1])
    require_shape("output", out, shape)
    require_shape("bias", bias, shape[-1:])
    require_shape("x3", x3, shape)
    communicator = environment.communicator(function, group)
    check_ranks(function, communicator, ALL_REDUCE_RANKS)
    environment.claim_fused(function, communicator)

    def compute() -> None:
        partial = wide(x1) @ wide(x2)
        # The formula is allreduce(x1 @ x2 + bias + x3): what every rank passes is added once a rank.
        for addend in (bias, x3):
            if addend is not None:
                partial = partial + wide(addend)
        store(out, communicator.all_reduce(partial))

    return Launch(uncontiguous("MatmulAllReduce", x1=x1, bias=bias, x3=x3), compute)


@aclnn(
    "aclnnMatmulAllReduce",
    "3*tensor 2*string 2*int64 tensor",
    serves="npu_mm_all_reduce_base",
    document=ALL_REDUCE,
    since="8.0.RC2",
    collective=True,
)
def matmul_all_reduce(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    group: str,
    reduce_op: str,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
) -> Launch:
    """out = sum over ranks of (x1 @ x2 + bias). x1: [m, k] or [b, s, k]; x2: [k, n]; bias: [n]."""
    return _all_reduce(
        environment, "aclnnMatmulAllReduce", x1, x2, bias, None, group, reduce_op, comm_turn, stream_mode, out
    )


@aclnn(
    "aclnnMatmulAllReduceV2",
    "4*tensor 2*string 2*int64 tensor",
    serves="npu_mm_all_reduce_base with x3",
    document=ALL_REDUCE_V2,
    since="8.0.RC2",
    collective=True,
)
def matmul_all_reduce_v2(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    x3: Tensor | None,
    group: str,
    reduce_op: str,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
) -> Launch:
    """out = sum over ranks of (x1 @ x2 + bias + x3). x3: the shape of out, this rank's part."""
    return _all_reduce(
        environment, "aclnnMatmulAllReduceV2", x1, x2, bias, x3, group, reduce_op, comm_turn, stream_mode, out
    )


def _check_pair(environment: Environment, function: str, x1: Tensor, x2: Tensor, bias: Tensor | None) -> None:
    """What ReduceScatter and AllGather ask of their operands."""
    check_chip(environment, function, tuple(MESH_RANKS))
    require(x1=x1, x2=x2)
    require_plain(x1=x1, x2=x2)
    for name, tensor in (("x1", x1), ("x2", x2), ("bias", bias)):
        require_dtype(name, tensor, HALF)
    require_same_dtype(x1=x1, x2=x2, bias=bias)
    require_rank("x1", x1, 2, 2)
    require_rank("x2", x2, 2, 2)
    require_rank("bias", bias, 1, 1)
    if is_transposed(x1):
        raise invalid("x1 does not support a transposed input.")
    check_x2(x2)
    if x1.shape[1] != x2.shape[0]:
        raise invalid(f"Expected k of x1 and x2 to be equal, but got {x1.shape[1]} and {x2.shape[0]}.")
    if not K_LOW <= x1.shape[1] < K_HIGH:
        raise invalid(f"The k-axis should be in range[{K_LOW}, {K_HIGH}), but it is {x1.shape[1]}.")
    require_shape("bias", bias, x2.shape[1:])


def _refuse_bias(bias: Tensor | None) -> None:
    """ReduceScatter and AllGather, bias: "not supported yet unless all zero"; only the device can see that."""
    if bias is not None and bool(bias.view().any()):
        raise inner("bias that is not zero is not supported.")


@aclnn(
    "aclnnMatmulReduceScatter",
    "3*tensor 2*string 2*int64 tensor",
    serves="npu_mm_reduce_scatter_base",
    document=REDUCE_SCATTER,
    since="8.0.RC2",
    collective=True,
)
def matmul_reduce_scatter(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    group: str,
    reduce_op: str,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
) -> Launch:
    """out [m / ranks, n] = this rank's rows of the sum over ranks of x1 [m, k] @ x2 [k, n]."""
    _check_pair(environment, "aclnnMatmulReduceScatter", x1, x2, bias)
    require(output=out)
    require_same_dtype(x1=x1, output=out)
    check_modes(reduce_op or "", comm_turn, stream_mode)
    communicator = environment.communicator("aclnnMatmulReduceScatter", group)
    check_ranks("aclnnMatmulReduceScatter", communicator, MESH_RANKS[environment.chip])
    if x1.shape[0] % communicator.size:
        raise invalid(f"m must be a multiple of the {communicator.size} ranks, but is {x1.shape[0]}.")
    rows = x1.shape[0] // communicator.size
    require_shape("output", out, (rows, x2.shape[1]))
    environment.claim_fused("aclnnMatmulReduceScatter", communicator)

    def compute() -> None:
        _refuse_bias(bias)
        total = communicator.all_reduce(wide(x1) @ wide(x2))
        store(out, total[communicator.rank * rows : (communicator.rank + 1) * rows])

    return Launch(uncontiguous("MatmulReduceScatter", x1=x1, bias=bias), compute)


@aclnn(
    "aclnnAllGatherMatmul",
    "3*tensor string 3*int64 2*tensor",
    serves="npu_all_gather_base_mm",
    document=ALL_GATHER,
    since="8.0.RC2",
    collective=True,
)
def all_gather_matmul(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    group: str,
    gather_index: int,
    comm_turn: int,
    stream_mode: int,
    out: Tensor,
    gathered: Tensor | None,
) -> Launch:
    """gathered [ranks * m, k] = every rank's x1; out = gathered @ x2."""
    _check_pair(environment, "aclnnAllGatherMatmul", x1, x2, bias)
    require(output=out)
    require_same_dtype(x1=x1, output=out, gatherOut=gathered)
    if gather_index != 0:
        raise invalid(f"Expected gatherIndex to be 0, but got {gather_index}.")  # AllGather, gatherIndex
    check_modes(None, comm_turn, stream_mode)
    if x1.shape[0] == 0:
        raise invalid("x1 must not be an empty tensor.")  # AllGather, return values
    communicator = environment.communicator("aclnnAllGatherMatmul", group)
    check_ranks("aclnnAllGatherMatmul", communicator, MESH_RANKS[environment.chip])
    rows = x1.shape[0] * communicator.size
    require_shape("output", out, (rows, x2.shape[1]))
    if gathered is not None and gathered.shape != (0,):  # op-plugin passes an empty one for gather_output=False
        require_shape("gatherOut", gathered, (rows, x1.shape[1]))
    environment.claim_fused("aclnnAllGatherMatmul", communicator)

    def compute() -> None:
        _refuse_bias(bias)
        whole = communicator.all_gather(x1.view().contiguous())
        if gathered is not None and gathered.shape != (0,):
            store(gathered, whole)
        store(out, whole.to(torch.float32) @ wide(x2))

    return Launch(uncontiguous("AllGatherMatmul", x1=x1, bias=bias), compute)


OPERATORS = (matmul_all_reduce, matmul_all_reduce_v2, matmul_reduce_scatter, all_gather_matmul)
