"""A step that knows its column of the plan and nothing else."""

from __future__ import annotations

import torch

from polyaccel.backend import RowSet, Step, TokenClass
from polyaccel.backend.step import plan_key


class KeyedStep(Step):
    """Only good for ``site[step]``."""

    def __init__(self, token_class: TokenClass = TokenClass.DECODE, *, adapters: bool = False) -> None:
        self.plan_key = plan_key(token_class, adapters)

    def tensor(self, name: str) -> torch.Tensor:
        raise LookupError(name)

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise LookupError(row_set)


EVERY_STEP = tuple(
    KeyedStep(token_class, adapters=adapters)
    for token_class in (TokenClass.DECODE, TokenClass.MIXED)
    for adapters in (False, True)
)
