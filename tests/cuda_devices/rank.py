"""A rank on its own GPU."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from polyaccel.backend import Device, RankAddress
from polyaccel_cuda.backend import CudaBackend
from polyaccel_cuda.communicator import CudaCommunicator


class Rank:
    """A backend and its communicator in a process of its own."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world, self.folder = rank, world, folder
        self.backend = CudaBackend()
        self.device: Device = self.backend.devices()[rank]
        torch.cuda.set_device(self.device.torch_device)
        self._groups = 0
        self.comm = self.group(60.0)

    def group(self, timeout: float) -> CudaCommunicator:
        """A further group of all ranks."""
        self._groups += 1
        store = f"file://{self.folder}/group{self._groups}"
        address = RankAddress(rank=self.rank, world_size=self.world, init_method=store, timeout=timeout)
        found = self.backend.connect(address)
        assert isinstance(found, CudaCommunicator)
        return found

    def drawn(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int, seed: int = 0) -> torch.Tensor:
        """What a rank contributes; every rank can say."""
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        return torch.randn(shape, generator=generator).to(dtype).to(self.device.torch_device)

    def same(self, x: torch.Tensor, what: str) -> None:
        """All ranks have the same bits."""
        bits = x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        assert len(set(self.comm.gather_objects(bits))) == 1, f"{what}: ranks differ"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.comm.close()
        self.backend.close()
