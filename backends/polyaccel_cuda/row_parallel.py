"""A row-parallel layer's product and sum over ranks together: by parts at prefill, with add and norm at decode."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from polyaccel.backend import Communicator
from polyaccel_cuda import check
from polyaccel_cuda.communicator import CudaCommunicator
from polyaccel_cuda.kernels import invariant
from polyaccel_cuda.kernels.few import MOST_ROWS
from polyaccel_cuda.kernels.rows import Units
from polyaccel_cuda.operators import Issuer
from polyaccel_cuda.product import full_precision, product
from polyaccel_cuda.step import CudaStep
from polyaccel_cuda.weight import FoldedWeight

Summed = tuple[torch.Tensor, torch.Tensor | None, Units | None]
"""``[T, n]`` summed over ranks, rows dense; the rank rows, summed as well; and the adapters, or None without any."""


def by_parts(
    issuer: Issuer, station: str, x: torch.Tensor, weight: FoldedWeight, step: CudaStep, comm: Communicator
) -> Summed | None:
    """The sum over ranks of ``x @ W.T``, each part of which is summed while the next is multiplied.

    Rank rows ride: they are further columns of the product, or are computed before it and put beside it. None where the
    product should be summed as a whole: few rows, no NCCL. The same on all ranks.

    Args:
        x: ``[T, k]``. station: as errors name it.
    """
    rows = x.shape[0] if x.dim() else 0
    if not isinstance(comm, CudaCommunicator) or rows <= MOST_ROWS:
        return None
    units, n = step.units(weight.spec.site, "tokens"), weight.spec.n
    matrix, bias, apart = weight.tensor, weight.bias, False
    rank_rows = 0
    if units is not None:
        rank_rows = min(step.rank_rows, weight.spec.rank_rows)
        apart = step.segmented or not weight.folded or weight.n_padded > n
        if not apart:
            matrix, bias = weight.covering(step.rank_rows)
            apart = matrix.shape[0] > n + weight.spec.rank_rows
            rank_rows = matrix.shape[0] - n
    if apart:
        matrix, bias = weight.tensor, weight.bias
    starts = comm.parts(rows, n + rank_rows, x.dtype)
    if len(starts) <= 2:
        return None
    check.rows(station, "x", x, weight, weight.spec.k)
    x = issuer.dense_rows(station, "x", x)
    y = torch.empty((rows, n + rank_rows), dtype=x.dtype, device=x.device)
    if apart and units is not None:
        h = issuer.rank_rows(x, weight, step, units)
        issuer.launch("pack", {"y": y, "h": h}, y[:, n:].copy_, h[:, :rank_rows])
    columns = matrix.shape[0]

    def produce(begin: int, end: int) -> None:
        operands = {"x": x, "weight": matrix}
        into = invariant.product if issuer.batch_invariant else product_into
        issuer.launch("linear", operands, into, x[begin:end], matrix, bias, y[begin:end, :columns])

    comm.sum_in_parts(y, starts, produce)
    return y[:, :n], None if units is None else y[:, n:], units


def product_into(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """``out[...] = x @ matrix.T + bias``, with the bits of ``polyaccel_cuda.product``; rows of out dense."""
    if x.device.type != "cuda":
        return out.copy_(linear(x, matrix, bias))
    if bias is not None:
        # Only into dense memory a bias is added before the rounding.
        return out.copy_(product(x, matrix, bias))
    with full_precision():
        return torch.mm(x, matrix.T, out=out)


def add_and_norm(
    y: torch.Tensor,
    comm: Communicator,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(normed, total)`` of the sum of ``y: [T, n]`` over ranks and a residual in one kernel; None if not.

    The same on all ranks.
    """
    if not isinstance(comm, CudaCommunicator) or not comm.adds_and_norms(y, residual.shape[1]):
        return None
    return comm.sum_add_norm(y, residual, norm_weight, eps)
