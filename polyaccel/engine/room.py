"""Room on a device: what one rank can give to the KV cache, and errors that say who lacks how much for what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from polyaccel.backend.device import Device
from polyaccel.backend.errors import CommunicationError, OutOfMemory
from polyaccel.backend.failure import ran_out_of_memory
from polyaccel.engine.config import EngineConfig

DEFAULT_HOST_KV_BYTES = 4 << 30


@contextmanager
def room_for(what: str, where: str, advice: str) -> Iterator[None]:
    """Memory that runs out inside is an OutOfMemory with all of this, unless it says so already.

    Args:
        where: the rank and its device.
    """
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error) or (isinstance(error, OutOfMemory) and where in str(error)):
            raise
        raise OutOfMemory(f"{where} has no room for {what}: {error}; {advice}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShare:
    """What one rank can give to the KV cache. Ranks send it to one another.

    Attributes:
        blocks: as many as fit into the budget and are of use.
        budget_bytes: what the options leave to the cache.
        option: the option that says so, with its value.
    """

    rank: int
    world_size: int
    device: str
    weight_bytes: int
    free_bytes: int
    budget_bytes: int
    block_size: int
    block_bytes: int
    blocks: int
    option: str

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        *,
        rank: int,
        world_size: int,
        device: Device,
        weight_bytes: int,
        block_size: int,
        block_bytes: int,
        most_blocks: int,
    ) -> Self:
        """Of a device on which the weights lie already."""
        free = device.memory().free
        if config.kv_cache_bytes is not None:
            budget, option = config.kv_cache_bytes, f"kv_cache_bytes={config.kv_cache_bytes}"
        else:
            budget, option = int(free * config.memory_fraction), f"memory_fraction={config.memory_fraction}"
            if device.torch_device.type == "cpu":
                # Ranks share the host's memory with everything else on it.
                budget = min(budget, DEFAULT_HOST_KV_BYTES) // world_size
        return cls(
            rank=rank,
            world_size=world_size,
            device=device.name,
            weight_bytes=weight_bytes,
            free_bytes=free,
            budget_bytes=budget,
            block_size=block_size,
            block_bytes=block_bytes,
            blocks=min(most_blocks, budget // block_bytes),
            option=option,
        )

    def shortage(self) -> str:
        """Why the rank cannot serve a single token."""
        who = f"rank {self.rank} of {self.world_size} on {self.device}" if self.world_size > 1 else self.device
        name = self.option.partition("=")[0]
        return (
            f"no room for a single KV block of {self.block_size} tokens on {who}: beside {self.weight_bytes} bytes of "
            f"weights {self.free_bytes} bytes are free, {self.option} leaves {self.budget_bytes} of them to the cache, "
            f"and a block takes {self.block_bytes}; raise {name}, free memory there or spread the model over more ranks"
        )


def agreed_blocks(shares: Sequence[KVShare], rank: int) -> int:
    """The blocks that every rank has room for.

    Raises:
        OutOfMemory: this rank has room for none.
        CommunicationError: another has, which is then the one to blame.
    """
    least = min(shares, key=lambda share: share.blocks)
    if least.blocks >= 1:
        return least.blocks
    if least.rank != rank:
        raise CommunicationError(least.shortage())
    raise OutOfMemory(least.shortage())
