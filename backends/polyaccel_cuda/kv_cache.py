"""The paged KV cache: the keys of one head of one block are one dense matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend import Device, KVCache, KVSpec, OperatorError

BLOCK_SIZE = 64


class BlockMajorKVCache(KVCache):
    """``keys, values: [layers, blocks, kv_heads, block_size, head_dim]``, zero at first."""

    def __init__(self, spec: KVSpec, device: Device) -> None:
        self.spec = spec
        self._device = device
        self.torch_device = device.torch_device
        shape = (spec.layers, spec.blocks, spec.kv_heads, spec.block_size, spec.head_dim)
        self.keys, self.values = device.zeros(shape, spec.dtype), device.zeros(shape, spec.dtype)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, ``[blocks, kv_heads, block_size, head_dim]``."""
        return self.keys[layer], self.values[layer]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        kept = slots >= 0
        block, offset = slots[kept] // self.spec.block_size, slots[kept] % self.spec.block_size
        for stored, new in ((self.keys, k), (self.values, v)):
            stored[layer][block, :, offset] = new[kept].to(stored.dtype)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block, offset = slots // self.spec.block_size, slots % self.spec.block_size
        return self.keys[layer][block, :, offset], self.values[layer][block, :, offset]

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
        with self._device.scope():
            read, written = (
                self._device.upload(torch.tensor(list(blocks), dtype=torch.int64)) for blocks in (sources, destinations)
            )
            for stored in (self.keys, self.values):
                stored.index_copy_(1, written, stored.index_select(1, read))

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()
