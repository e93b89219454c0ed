"""The paged KV cache as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend.device import Device
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVCache, KVSpec


class TensorKVCache(KVCache):
    """``[layers, 2 (key, value), 1 + blocks * block_size, kv_heads, head_dim]``, zero at first.

    Slot ``s`` is row ``s + 1``: row 0 takes the tokens that are not to be stored (slot -1), so that dropping one needs
    neither a mask nor its length.
    """

    def __init__(self, spec: KVSpec, device: Device) -> None:
        self.spec = spec
        rows = 1 + spec.blocks * spec.block_size
        with device.scope():
            self._rows = device.zeros((spec.layers, 2, rows, spec.kv_heads, spec.head_dim), spec.dtype)
        self._device = device
        self.torch_device = device.torch_device

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        rows = slots + 1
        stored = self._rows[layer]
        stored[0].index_copy_(0, rows, k.to(self.spec.dtype))
        stored[1].index_copy_(0, rows, v.to(self.spec.dtype))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slots + 1
        stored = self._rows[layer]
        return stored[0].index_select(0, rows), stored[1].index_select(0, rows)

    def blocks(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[blocks, block_size, kv_heads, head_dim]`` of a layer's keys and values."""
        stored = self._by_block()[layer]
        return stored[0], stored[1]

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """All sources are read before any destination is written.

        Raises:
            OperatorError: the lists differ in length or name a block that does not exist.
        """
        if len(sources) != len(destinations):
            raise OperatorError("KVCache.copy_blocks", f"{len(sources)} sources for {len(destinations)} destinations")
        for block in (*sources, *destinations):
            if not 0 <= block < self.spec.blocks:
                raise OperatorError("KVCache.copy_blocks", f"block {block} of {self.spec.blocks}")
        if not sources:
            return
        device = self._rows.device
        with self._device.scope():
            blocks = self._by_block()
            copies = blocks.index_select(2, torch.tensor(list(sources), dtype=torch.int64, device=device))
            blocks.index_copy_(2, torch.tensor(list(destinations), dtype=torch.int64, device=device), copies)

    @property
    def nbytes(self) -> int:
        return self._rows.numel() * self._rows.element_size()

    def _by_block(self) -> torch.Tensor:
        """View ``[layers, 2, blocks, block_size, kv_heads, head_dim]``."""
        spec = self.spec
        return self._rows[:, :, 1:].view(spec.layers, 2, spec.blocks, spec.block_size, spec.kv_heads, spec.head_dim)
