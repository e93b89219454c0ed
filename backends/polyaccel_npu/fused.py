"""npu_mm_all_reduce_base: a product and its sum over ranks as one kernel, and when it may be used.

CANN's formula is ``all_reduce(x1 @ x2 + bias + x3)``. So x3 is this rank's partial adapter delta, and a bias is given
by the one rank that holds it. The rules are those of aclnnMatmulAllReduce's document (ops-transformer,
mc2/matmul_all_reduce): Atlas A2 alone; 1, 2, 4 or 8 ranks in one full mesh, which is one node; fp16 or bf16; all fused
operators of a process on one communicator; meant for prefill, not for decode; no empty operand. What it says nothing
of, ranks whose shapes differ, is avoided: the backend asks for equal shards.

Whether every run gives the same bits follows HCCL's setting: HCCL_DETERMINISTIC is read when a communicator is made
and holds for the fused operator's reduction as for all_reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend import OperatorError, Query, Reason, TokenClass
from polyaccel_npu import runtime
from polyaccel_npu.communicator import NpuCommunicator
from polyaccel_npu.issue import Issuer

WORLDS = (1, 2, 4, 8)
DTYPES = ("float16", "bfloat16")
MOST_K = 2**31 - 1


def refusals(query: Query, groups: Sequence[NpuCommunicator], chips: Sequence[str], fused_chip: bool) -> list[Reason]:
    """Why a row-parallel site is not fused; empty if it is. The same on all ranks."""
    reasons = []
    world = query.integer("world_size", 1)
    if query.token_class is TokenClass.DECODE:
        reasons.append("aclnnMatmulAllReduce is for prefill; its document advises against decode")
    if world == 1:
        reasons.append("one rank: there is nothing to sum")
    elif world not in WORLDS:
        reasons.append(f"{world} ranks; aclnnMatmulAllReduce takes {', '.join(map(str, WORLDS))}")
    if not fused_chip:
        reasons.append(f"chip {', '.join(sorted(set(chips))) or 'unknown'}; aclnnMatmulAllReduce is for A2 (910B)")
    dtype = str(query.static.get("dtype", "")).removeprefix("torch.")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype or 'unknown'}; aclnnMatmulAllReduce takes {' and '.join(DTYPES)}")
    if query.static.get("quantised"):
        reasons.append("the weight is quantised")
    if query.integer("k", 1) > MOST_K:
        reasons.append(f"k {query.integer('k')} is above {MOST_K}")
    if query.static.get("reduce") is False:
        reasons.append("the caller sums later")
    if world > 1:
        if not groups:
            reasons.append("no communicator is open")
        elif len(groups) > 1:
            reasons.append(f"{len(groups)} communicators; fused operators of a process must share one")
        else:
            reasons += groups[0].fused_refusals()
    return reasons


class MatmulAllReduce:
    """Launches the fused operator."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as the operator takes it: dense; a copy is counted under the station's own name for it."""
        return self._issuer.operands.dense("mm_all_reduce_base", "x", x)

    def __call__(
        self,
        x: torch.Tensor,
        matrix: torch.Tensor,
        comm: NpuCommunicator,
        bias: torch.Tensor | None,
        delta: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sum over ranks of ``x @ matrix.T + bias + delta``; ``matrix: [n, k]`` dense, ``delta: [T, n]``; ``x`` as
        :meth:`rows` gives it."""
        operator, operands = "mm_all_reduce_base", self._issuer.operands
        if not x.shape[0] or not matrix.shape[0]:
            # Empty operands are refused, and every rank has as many rows: nobody calls.
            return x.new_empty((x.shape[0], matrix.shape[0]))
        if not x.shape[1]:
            x, matrix = x.new_zeros((x.shape[0], 1)), matrix.new_zeros((matrix.shape[0], 1))
        x1, x2 = x, operands.transposed(operator, "x2", matrix)
        bias, x3 = operands.dense_or_none(operator, "bias", bias), operands.dense_or_none(operator, "x3", delta)
        comm.note_all_reduce(x1.shape[0] * matrix.shape[0] * x1.element_size())
        fused = runtime.ops().npu_mm_all_reduce_base
        given = {"x1": x1, "x2": x2, "bias": bias, "x3": x3}
        hcom = comm.hcom()
        return self._issuer.tensor(operator, given, fused, x1, x2, hcom, reduce_op="sum", bias=bias, x3=x3)


def own_group(station: str, comm: object, groups: Sequence[NpuCommunicator]) -> NpuCommunicator:
    """The communicator that the plan was made for.

    Raises:
        OperatorError: another one was handed over.
    """
    if not isinstance(comm, NpuCommunicator) or not groups or comm is not groups[0]:
        raise OperatorError(station, "was planned as MatmulAllReduce on the process's first communicator, not this")
    return comm
