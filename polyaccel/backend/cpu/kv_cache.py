"""The paged KV cache in the order in which attention multiplies: the keys of one head of one block are one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyaccel.backend.device import Device
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVCache, KVSpec


class HeadMajorKVCache(KVCache):
    """``[layers, 2 (key, value), blocks + 1, kv_heads, block_size, head_dim]``, zero at first.

    Block b is the cache's block b; the last one takes the tokens that are not to be stored (slot -1).
    """

    def __init__(self, spec: KVSpec, device: Device) -> None:
        self.spec = spec
        self._device = device
        self.torch_device = device.torch_device
        shape = (2, spec.blocks + 1, spec.kv_heads, spec.block_size, spec.head_dim)
        with device.scope():
            self._blocks = device.zeros((spec.layers, *shape), spec.dtype)
        self._rows = [layer.view(-1, spec.head_dim) for layer in self._blocks]
        self._matrices = [layer.view(-1, spec.block_size * spec.head_dim) for layer in self._blocks]
        # Rows from a slot's row of the first head's keys to those of its other keys and values.
        values = (spec.blocks + 1) * spec.kv_heads * spec.block_size
        keys = torch.arange(spec.kv_heads, dtype=torch.int64) * spec.block_size
        self._heads = torch.cat((keys, keys + values))
        self._copies = torch.empty(0, dtype=spec.dtype)
        self._keys = [layer[0] for layer in self._blocks]
        self._values = [layer[1] for layer in self._blocks]

    def keys(self, layer: int) -> torch.Tensor:
        """View ``[blocks + 1, kv_heads, block_size, head_dim]``."""
        keys: torch.Tensor = self._keys[layer]
        return keys

    def values(self, layer: int) -> torch.Tensor:
        """View ``[blocks + 1, kv_heads, block_size, head_dim]``."""
        values: torch.Tensor = self._values[layer]
        return values

    def copies(self, layer: int, matrices: torch.Tensor) -> torch.Tensor:
        """Copies ``[m * block_size, head_dim]`` of the ``matrices``, each the keys or values of one head of one block.

        ``matrices: [m]`` int64: ``block * kv_heads + head`` for keys, ``(blocks + 1) * kv_heads`` more for values. The
        copies live until the next call: memory of their size is slow when it is new.
        """
        stored = self._matrices[layer]
        shape = (len(matrices), stored.shape[1])
        if self._copies.numel() < shape[0] * shape[1]:
            self._copies = torch.empty(shape[0] * shape[1], dtype=self.spec.dtype)
        copied = self._copies[: shape[0] * shape[1]].view(shape)
        torch.index_select(stored, 0, matrices, out=copied)
        return copied.view(-1, self.spec.head_dim)

    def store(self, layer: int, rows: torch.Tensor, kv: torch.Tensor) -> None:
        """Write ``kv: [T, 2 kv_heads, head_dim]``, keys and then values, at ``rows`` of :meth:`rows_of`."""
        self._rows[layer].index_put_((rows,), kv)

    def rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        """``[T, 2 kv_heads]`` int64: for each of the ``slots: [T]`` int64 the rows of its keys, then of its values."""
        spec = self.spec
        slots = torch.where(slots < 0, spec.blocks * spec.block_size, slots)
        if spec.kv_heads > 1:
            blocks = torch.div(slots, spec.block_size, rounding_mode="floor")
            slots = torch.add(slots, blocks, alpha=(spec.kv_heads - 1) * spec.block_size)
        return slots.unsqueeze(1) + self._heads

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.store(layer, self.rows_of(slots), torch.cat((k, v), dim=1).to(self.spec.dtype))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows_of(slots)
        found = self._rows[layer].index_select(0, rows.flatten()).view(*rows.shape, self.spec.head_dim)
        k, v = found.split(self.spec.kv_heads, dim=1)
        return k, v

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
        if sources:
            copies = self._blocks.index_select(2, torch.tensor(list(sources), dtype=torch.int64))
            self._blocks.index_copy_(2, torch.tensor(list(destinations), dtype=torch.int64), copies)

    @property
    def nbytes(self) -> int:
        return self._blocks.numel() * self._blocks.element_size()
