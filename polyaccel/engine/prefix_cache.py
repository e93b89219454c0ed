"""Finds the KV blocks that already hold a prompt's beginning."""

from __future__ import annotations

from collections.abc import Hashable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from polyaccel.engine.batch_state import BatchState
from polyaccel.engine.block_pool import BlockPool

BlockKey = tuple[Hashable, bytes, bytes]


def chain(parent: bytes, tokens: bytes) -> bytes:
    """Digest of a sequence up to and including a block, from the digest before it and the block's tokens."""
    return blake2b(parent + tokens, digest_size=16).digest()


class PrefixCache:
    """Full blocks by (adapter key, digest of what precedes them, their tokens).

    Lookup compares the tokens and the adapter key themselves, not only a hash. Blocks are entered once their content is
    in memory for good: the step that wrote their last token has completed.
    """

    def __init__(self, blocks: int, block_size: int, *, enabled: bool = True) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self.pool = BlockPool(blocks, self._forget)
        self._blocks: dict[BlockKey, int] = {}
        self._keys: list[BlockKey | None] = [None] * blocks
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def lookup(self, key: Hashable, tokens: npt.NDArray[np.int32]) -> tuple[list[int], bytes]:
        """Blocks that hold the beginning of ``tokens`` (int32), and the digest at their end.

        The last token is never covered: its logits are needed, so it is computed again.
        """
        found: list[int] = []
        digest = self._epoch.to_bytes(8, "little")
        if not self.enabled:
            return found, digest
        size = self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            content = tokens[start : start + size].tobytes()
            block = self._blocks.get((key, digest, content))
            if block is None:
                break
            found.append(block)
            digest = chain(digest, content)
        return found, digest

    def insert(self, key: Hashable, parent: bytes, tokens: npt.NDArray[np.int32], block: int) -> bytes:
        """Enter a full, referenced block; returns the digest at its end. A duplicate keeps the block first entered."""
        content = tokens.tobytes()
        entry = (key, parent, content)
        if entry not in self._blocks:
            self._blocks[entry] = block
            self._keys[block] = entry
            self.pool.mark_cached(block)
        return chain(parent, content)

    def clear(self) -> None:
        """Forget every block, and whatever running sequences would still enter."""
        self.pool.forget_cached()
        self._blocks.clear()
        self._keys = [None] * len(self._keys)
        self._epoch += 1

    def _forget(self, block: int) -> None:
        entry = self._keys[block]
        if entry is not None:
            del self._blocks[entry]
            self._keys[block] = None


def enter_filled_blocks(
    cache: PrefixCache, state: BatchState, slots: npt.NDArray[np.int64], computed: npt.NDArray[np.int64]
) -> None:
    """Enter the blocks that a completed step has filled: ``slots`` now have ``computed`` tokens in the KV cache."""
    if not cache.enabled:
        return
    size = cache.block_size
    # Tokens of a sequence that was ended from outside may never become known.
    full_blocks = np.minimum(computed, state.known[slots]) // size
    due = full_blocks > state.hashed[slots]
    if not due.any():
        return
    for slot, full in zip(slots[due].tolist(), full_blocks[due].tolist(), strict=True):
        key = state.sequence(slot).request.cache_key
        for block in range(int(state.hashed[slot]), full):
            tokens = state.tokens[slot, block * size : (block + 1) * size]
            place = int(state.block_tables[slot, block])
            state.digests[slot] = cache.insert(key, state.digests[slot], tokens, place)
        state.hashed[slot] = full
