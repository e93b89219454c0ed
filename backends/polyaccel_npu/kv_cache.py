"""The paged KV cache as FIA reads it: ``(blocks, block_size, heads * head_dim)``, called BnBsH in its documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend import Device, KVCache, KVSpec, OperatorError
from polyaccel_npu.attention_plan import KeyRoom

BLOCK_SIZE = 128
"""Prefill takes multiples of 128 up to 512, and nothing smaller."""
SPARE_BLOCKS = 2
"""Where tokens that are not to be stored go: the KV scatter may not see a slot twice, nor a negative one."""


class BlockKVCache(KVCache):
    """``keys, values: [layers, blocks + spare, block_size, kv_heads, head_dim]``, zero at first."""

    def __init__(self, spec: KVSpec, device: Device) -> None:
        self.spec = spec
        self._device = device
        self.torch_device = device.torch_device
        spare = -(-SPARE_BLOCKS * BLOCK_SIZE // spec.block_size)
        shape = (spec.layers, spec.blocks + spare, spec.block_size, spec.kv_heads, spec.head_dim)
        self.keys, self.values = device.zeros(shape, spec.dtype), device.zeros(shape, spec.dtype)
        # Views made once: a view a call costs more than the call's own checks.
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))
        self._flat = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in self._layers]
        self._paged = [(k.flatten(2), v.flatten(2)) for k, v in self._layers]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, ``[blocks + spare, block_size, kv_heads, head_dim]``."""
        return self._layers[layer]

    def paged(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as ``[blocks + spare, block_size, kv_heads * head_dim]``."""
        return self._paged[layer]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        rows = torch.where(slots < 0, self.spec.blocks * self.spec.block_size, slots)
        for stored, new in zip(self._flat[layer], (k, v), strict=True):
            stored.index_copy_(0, rows, new.to(stored.dtype))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._flat[layer]
        return k.index_select(0, slots), v.index_select(0, slots)

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
    def room(self) -> KeyRoom:
        """What one call of FIA may read of it."""
        return KeyRoom(self.spec.block_size, self.keys.shape[1])

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()
