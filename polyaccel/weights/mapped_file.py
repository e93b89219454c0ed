"""A file as a byte array without reading it."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polyaccel.backend.errors import ModelLoadError, PolyaccelError

# Python names this flag from 3.13 on; the value is the same on every Linux that torch runs on.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def map_file(path: Path, error: type[PolyaccelError] = ModelLoadError) -> npt.NDArray[np.uint8]:
    """Map a file privately: bytes [size], uint8. The memory is released when the last view of it is gone.

    A write through a view stays in this process and never reaches the file; later reads through the same map would see
    it, so treat every view as read-only. Raises ``error`` for a missing, empty or unreadable file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise error(f"{path}: the file is empty")
            # NOTE: a read-only map would make a stray write through a torch view a segmentation fault.
            # NORESERVE, because the kernel otherwise refuses a private map larger than memory and swap together.
            if hasattr(mmap, "MAP_PRIVATE"):
                mapped = mmap.mmap(
                    file.fileno(),
                    size,
                    flags=mmap.MAP_PRIVATE | _NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            else:
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as cause:
        raise error(f"{path}: cannot be mapped ({cause})") from cause
    return np.frombuffer(mapped, dtype=np.uint8)
