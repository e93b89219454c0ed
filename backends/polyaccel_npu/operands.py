"""The one place where operands are brought into the layout that CANN takes; every copy is counted.

aclnn functions declare for each operand whether strides are free. For MatmulAllReduce only x2 may be strided, and only
as the transpose view of a dense matrix; x1, bias, x3 and scales must be dense. Handing over anything else gives ``Op
MatmulAllReduce has 1 uncontiguous input``, asynchronously, under another operator's name. So does the KV scatter, and
FIA reads strided operands as if they were dense.
"""

from __future__ import annotations

import torch

from polyaccel.backend import Ledger, OperatorError
from polyaccel.backend.ledger import COPY_PREFIX


class Operands:
    """Of one backend instance; holds nothing but the ledger: no copy outlives its call."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def dense(self, operator: str, argument: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself if it is contiguous, else a copy, counted as ``copy.<operator>.<argument>``."""
        if x.is_contiguous():
            return x
        self._ledger.record(f"{COPY_PREFIX}{operator}.{argument}")
        return x.contiguous()

    def dense_or_none(self, operator: str, argument: str, x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else self.dense(operator, argument, x)

    def transposed(self, operator: str, argument: str, matrix: torch.Tensor) -> torch.Tensor:
        """The transpose view ``[k, n]`` of a dense ``matrix: [n, k]``, which is the only strided x2 that CANN takes.

        Raises:
            OperatorError: the matrix is not dense: a copy of it would be a second weight in memory.
        """
        if not matrix.is_contiguous():
            raise OperatorError.describe(operator, f"{argument} must be a dense [n, k] buffer", {argument: matrix})
        return matrix.t()
