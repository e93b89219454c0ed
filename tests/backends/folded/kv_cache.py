"""KV blocks of 128 tokens, tokens innermost."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend import KVCache, KVSpec, OperatorError

from .device import FoldedDevice

BLOCK_SIZE = 128


class FoldedKVCache(KVCache):
    """``keys, values: [layers, kv_heads, head_dim, blocks, block_size]``; what was never written is NaN."""

    def __init__(self, spec: KVSpec, device: FoldedDevice) -> None:
        self.spec = spec
        self._device = device
        self.torch_device = device.torch_device
        shape = (spec.layers, spec.kv_heads, spec.head_dim, spec.blocks, spec.block_size)
        self.keys, self.values = device.empty(shape, spec.dtype), device.empty(shape, spec.dtype)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._device.queue.put(lambda: self.store(layer, slots, k, v))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._device.queue.flush()
        k, v = self.at(layer, slots)
        return k.permute(2, 0, 1), v.permute(2, 0, 1)

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        if len(sources) != len(destinations):
            raise OperatorError("KVCache.copy_blocks", f"{len(sources)} sources for {len(destinations)} destinations")
        for block in (*sources, *destinations):
            if not 0 <= block < self.spec.blocks:
                raise OperatorError("KVCache.copy_blocks", f"block {block} of {self.spec.blocks}")
        read, written = list(sources), list(destinations)

        def copy() -> None:
            for tensor in (self.keys, self.values):
                tensor[:, :, :, written] = tensor[:, :, :, read]

        self._device.queue.put(copy)

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    # -- on the device -------------------------------------------------------------------------------------------------

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write ``k, v: [tokens, kv_heads, head_dim]`` now, except tokens of slot -1."""
        kept = slots >= 0
        for tensor, new in ((self.keys, k), (self.values, v)):
            tensor[layer].flatten(2)[:, :, slots[kept]] = new[kept].permute(1, 2, 0).to(tensor.dtype)

    def at(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[kv_heads, head_dim, tokens]`` now."""
        return self.keys[layer].flatten(2)[:, :, slots], self.values[layer].flatten(2)[:, :, slots]
