"""New memory of a call: poisoned, and guarded on both sides, whichever device it is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyaccel_conformance.harness.memory import Poison, as_bits, poison_

GUARD_BYTES = 512
"""A multiple of every alignment that allocators promise, so that new memory is aligned as it would be without."""

DENSE = frozenset({"aten::empty", "aten::new_empty", "aten::empty_like"})
OTHER = frozenset({"aten::empty_strided", "aten::new_empty_strided", "aten::empty_permuted"})


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """One allocation: ``count`` elements of ``flat``, ``guard`` elements before and behind them."""

    flat: torch.Tensor
    guard: int
    count: int


class Allocations:
    """Makes and remembers the uninitialised memory that a call asks torch for."""

    def __init__(self, poison: Poison) -> None:
        self._poison = poison
        self._blocks: list[_Block] = []

    def new(self, name: str, allocate: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``allocate`` returns, or as much memory with guards; poisoned.

        ``name``: of the aten operator, one of :data:`DENSE` and :data:`OTHER`.
        """
        tensor = allocate()
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return tensor
        if name in DENSE and tensor.numel() and tensor.is_contiguous():
            tensor = self._guarded(tensor)
        return poison_(tensor, self._poison) if tensor.numel() else tensor

    def _guarded(self, tensor: torch.Tensor) -> torch.Tensor:
        guard, count = GUARD_BYTES // tensor.element_size(), tensor.numel()
        flat = poison_(tensor.new_empty(count + 2 * guard), self._poison)
        self._blocks.append(_Block(flat, guard, count))
        return flat.as_strided(tensor.shape, tensor.stride(), guard)

    def trespassed(self) -> int:
        """Guard elements that no longer hold the poison."""
        found = 0
        for block in self._blocks:
            bits = as_bits(block.flat.cpu())
            wanted = as_bits(poison_(torch.empty(1, dtype=block.flat.dtype), self._poison))
            guards = torch.cat((bits[: block.guard], bits[block.guard + block.count :]))
            found += int(torch.count_nonzero(guards != wanted))
        return found
