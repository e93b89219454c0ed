"""KV blocks: reference counts, the free list, and which unreferenced blocks are still worth keeping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt


class BlockPool:
    """``blocks`` KV blocks, numbered from 0.

    A cached block (one whose content the prefix cache can name) stays readable when nobody references it. Once no other
    block is free it is evicted, least recently released first.
    """

    def __init__(self, blocks: int, evicted: Callable[[int], None]) -> None:
        """``evicted(block)`` is called when a cached block is given away."""
        self.blocks = blocks
        self._evicted = evicted
        self._references = np.zeros(blocks, dtype=np.int32)
        self._cached = np.zeros(blocks, dtype=np.bool_)
        self._free = list(range(blocks - 1, -1, -1))
        self._unreferenced: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that :meth:`take` could give."""
        return len(self._free) + len(self._unreferenced)

    @property
    def used(self) -> int:
        """Blocks that some sequence references."""
        return self.blocks - self.available

    def unreferenced(self, blocks: list[int]) -> int:
        """How many of these cached blocks count as available."""
        return sum(block in self._unreferenced for block in blocks)

    def take(self, count: int) -> npt.NDArray[np.int32]:
        """``count`` writable blocks with one reference each. ``count`` must not exceed :attr:`available`."""
        if count > self.available:
            raise ValueError(f"{count} blocks were asked for and {self.available} are available")
        start = max(len(self._free) - count, 0)
        taken = self._free[start:]
        del self._free[start:]
        while len(taken) < count:
            block, _ = self._unreferenced.popitem(last=False)
            self._cached[block] = False
            self._evicted(block)
            taken.append(block)
        blocks = np.array(taken, dtype=np.int32)
        self._references[blocks] = 1
        return blocks

    def reference(self, blocks: list[int]) -> None:
        """Share cached blocks: one more reference each."""
        for block in blocks:
            if self._references[block] == 0:
                del self._unreferenced[block]
            self._references[block] += 1

    def mark_cached(self, block: int) -> None:
        """The prefix cache names this referenced block from now on."""
        self._cached[block] = True

    def forget_cached(self) -> None:
        """No block is cached any more; ``evicted`` is not called."""
        self._cached[:] = False
        self._free.extend(self._unreferenced)
        self._unreferenced.clear()

    def release(self, blocks: npt.NDArray[np.int32]) -> None:
        """Drop one reference each; ``blocks`` are one sequence's, in order, each once."""
        references = self._references
        references[blocks] -= 1
        idle = blocks[references[blocks] == 0]
        kept = self._cached[idle]
        # The end of a chain goes first: a block is unreachable once its parent is gone.
        self._unreferenced.update((block, None) for block in idle[kept][::-1].tolist())
        self._free.extend(idle[~kept][::-1].tolist())

    def references(self, block: int) -> int:
        return int(self._references[block])
