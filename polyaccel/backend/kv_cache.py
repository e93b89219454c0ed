"""The paged KV cache. Block size and axis order are the backend's; the core counts blocks and tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyaccel.backend.placed import Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """What to allocate. ``kv_heads`` may differ between ranks; ``blocks`` is the same on all of them."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    blocks: int
    block_size: int

    def bytes_per_block(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.block_size * self.dtype.itemsize


class KVCache(Placed, ABC):
    """Keys and values of all layers of one device.

    Slot ``s`` is token ``s % block_size`` of block ``s // block_size``.
    """

    spec: KVSpec

    @abstractmethod
    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store ``k, v: [tokens, kv_heads, head_dim]`` at ``slots: [tokens]`` int64 (-1: the token is not stored)."""

    @abstractmethod
    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[tokens, kv_heads, head_dim]`` at ``slots: [tokens]`` int64, for composites and tests."""

    @abstractmethod
    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy whole blocks in all layers, ordered with the operators of the device."""

    @property
    @abstractmethod
    def nbytes(self) -> int: ...
