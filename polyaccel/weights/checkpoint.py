"""What every checkpoint reader offers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from polyaccel.backend.errors import ModelLoadError, PolyaccelError
from polyaccel.weights.locate import ModelFiles, locate_model

if TYPE_CHECKING:
    import torch


class Checkpoint(ABC):
    """Tensors by their Hugging Face names, read part by part, and the model's configuration.

    A checkpoint validates everything it knows about its files when it is opened; reading then fails only if a file
    changes underneath. Reading is safe from several threads. ``close()`` forbids further reads; tensors already read
    stay valid.
    """

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in a fixed order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what ``read(name)`` returns. Raises ModelLoadError for an unknown name."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of what ``read(name)`` returns; float32 for tensors that are stored quantised."""

    @abstractmethod
    def nbytes(self, name: str) -> int:
        """Bytes that the tensor takes in the file."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """Read one tensor, or the part ``rows`` of its first and ``cols`` of its second dimension.

        Returns a CPU tensor [rows, cols] (or the tensor's own shape). Only that part is touched and dequantised. The
        result may be a strided view of the mapped file: treat it as read-only, and copy it before changing it. Slices
        have step 1 and lie within the shape. Raises ModelLoadError otherwise, for unknown names, and after ``close()``.
        """

    @abstractmethod
    def hf_config(self) -> dict[str, object]:
        """The model's configuration with the keys of a Hugging Face ``config.json``."""

    @abstractmethod
    def generation_config(self) -> dict[str, object]:
        """The keys of a Hugging Face ``generation_config.json``; empty where the checkpoint has none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest that tells checkpoints apart: configuration, headers and a sample of every tensor.

        Cheap (a few KiB a tensor), stable across machines and paths, and no proof against an adversary.
        """

    @abstractmethod
    def close(self) -> None:
        """Forbid further reads. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str] | ModelFiles) -> Checkpoint:
    """Open the checkpoint at ``path`` (whatever ``locate_model`` accepts) and validate its headers.

    Raises ModelNotFound or ModelLoadError.
    """
    files = path if isinstance(path, ModelFiles) else locate_model(path)
    if files.kind == "gguf":
        from polyaccel.weights.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(files.path)
    from polyaccel.weights.safetensors_checkpoint import SafetensorsCheckpoint

    return SafetensorsCheckpoint(files.path)


def slice_bounds(
    part: slice | None, extent: int, what: str, error: type[PolyaccelError] = ModelLoadError
) -> tuple[int, int]:
    """``part`` of a dimension as (start, stop), 0 <= start <= stop <= extent. None means all of it.

    Unlike Python's own slicing nothing is clipped: a shard beyond the tensor is a mistake, not an empty shard.
    """
    if part is None:
        return 0, extent
    start = 0 if part.start is None else part.start
    stop = extent if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= extent:
        raise error(f"{what}: cannot take [{part.start}:{part.stop}:{part.step}] of a dimension of {extent}")
    return start, stop


def sample_bytes(count: int) -> tuple[int, int]:
    """Which bytes of a tensor of ``count`` bytes enter a fingerprint: up to 4 KiB around its middle."""
    start = max(0, count // 2 - 2048)
    return start, min(count, start + 4096)


def as_path(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path))
