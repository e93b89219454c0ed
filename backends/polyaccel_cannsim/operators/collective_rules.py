"""What the pages of all fused matmul + collective operators ask alike: chip, ranks, modes, strides.

"AllReduce", "ReduceScatter", "AllGather": the pages that fused_collective.py names.
"""

from __future__ import annotations

from collections.abc import Callable

from .descriptor import Tensor, is_contiguous, is_transposed
from .environment import CHIP_910B, CHIP_A3, Communicator, Environment
from .refusal import inner, invalid, tiling

INT_MAX = 2147483647  # AllReduce: b*s, m, k, n must not exceed it
K_LOW, K_HIGH = 256, 65535  # ReduceScatter, AllGather: k in [256, 65535)
STREAM_MODE = 1  # all three: "only 1"

ALL_REDUCE_RANKS = (1, 2, 4, 8)  # AllReduce, constraints; one HCCS mesh
MESH_RANKS = {CHIP_910B: (2, 4, 8), CHIP_A3: (2, 4, 8, 16, 32)}  # ReduceScatter and AllGather: mesh; double ring


def check_chip(environment: Environment, function: str, supported: tuple[str, ...]) -> None:
    if environment.chip not in supported:
        raise invalid(f"{function} is not supported on this chip: {environment.chip}.")


def check_x2(x2: Tensor) -> None:
    """All three pages, x2: strided only as the transpose of its last two axes."""
    if not is_contiguous(x2) and not is_transposed(x2):
        raise invalid(
            "x2 supports non-contiguous input only as a transpose of the last two axes, but has "
            f"shape {list(x2.shape)} and stride {list(x2.stride)}."
        )


def check_modes(reduce_op: str | None, comm_turn: int, stream_mode: int) -> None:
    if reduce_op is not None and reduce_op != "sum":
        raise invalid(f"Expected reduceOp to be sum, but got {reduce_op}.")
    if comm_turn != 0:
        raise invalid(f"Expected commTurn to be 0, but got {comm_turn}.")
    if stream_mode != STREAM_MODE:
        raise invalid(f"Expected streamMode to be 1, but got {stream_mode}.")


def check_ranks(function: str, communicator: Communicator, ranks: tuple[int, ...]) -> None:
    if communicator.size not in ranks:
        raise tiling(f"{function} supports {', '.join(map(str, ranks))} ranks, but the group has {communicator.size}.")


def uncontiguous(function: str, **operands: Tensor | None) -> Callable[[], None]:
    """The second stage's check of operands that are not declared "ignore contiguous".

    Declared so are x2 and the antiquant tensors only, and no input is converted automatically
    (mc2/matmul_all_reduce/op_host/matmul_all_reduce_def.cpp), although the page ticks bias and x3.
    lmdeploy issue 2855 has the text.
    """
    strided = [name for name, tensor in operands.items() if tensor is not None and not is_contiguous(tensor)]

    def check() -> None:
        if strided:
            raise inner(f"Op {function} has {len(strided)} uncontiguous input, but set 0 auto conversion")

    return check
