"""Compiled kernels from one process to the next: what Triton asks for is read from, and kept in, a versioned folder.

Triton has one cache manager a process. The first backend sets it, later ones share it and its counts: this state is
Triton's, nothing of it is kept here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from polyaccel_cuda.cache_folder import DIGITS, CacheFolder, cache_root, key_of

LIBRARIES = (".so", ".pyd")
"""What Triton compiles besides kernels: its own helpers in C, one file each."""

logger = logging.getLogger("polyaccel.cuda")


def kernel_sources() -> list[Path]:
    """The modules of this package that hold kernels, by name."""
    home = Path(__file__).parent
    return [*sorted((home / "kernels").glob("*.py")), home / "step.py"]


def key_fields(devices: Sequence[str], triton_version: str) -> dict[str, str]:
    """What makes compiled kernels useless for another start: their source, Triton, torch, the driver, the devices.

    ``devices``: names of all that this process may use.
    """
    source = hashlib.sha256()
    for path in kernel_sources():
        content = path.read_bytes()
        source.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return {
        "kernels": source.hexdigest()[:16],
        "triton": triton_version,
        "torch": str(torch.__version__),
        "driver": driver_version(),
        "device": " + ".join(sorted(set(devices))),
    }


def driver_version() -> str:
    """The newest CUDA that the driver knows, such as ``12.8``; empty without a driver."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    version = 0 if ask is None else int(ask())
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""


class KernelCache:
    """What one process read and compiled. Safe to use from several threads."""

    def __init__(self, folder: CacheFolder) -> None:
        self.folder = folder
        self.hits = 0
        self.compiled: list[str] = []
        self.seconds = 0.0
        self._lock = threading.Lock()

    def report(self) -> str:
        """Such as ``kernels: 31 from the cache, 0 compiled``."""
        spent = f" in {self.seconds:.1f} s" if self.compiled else ""
        return f"kernels: {self.hits} from the cache, {len(self.compiled)} compiled{spent}"

    def count_hit(self) -> None:
        with self._lock:
            self.hits += 1

    def count_compiled(self, name: str, seconds: float) -> None:
        with self._lock:
            self.compiled.append(name)
            self.seconds += seconds
        logger.info("compiled %s in %.2f s", name, seconds)

    # -- groups of files ---------------------------------------------------------------------------------------------

    def group(self, entry: str, name: str) -> dict[str, str] | None:
        """Paths by name of the files that belong together; None if there are none, or one is missing or wrong."""
        for path in self.folder.find(entry, _group_name(name)):
            try:
                listed = json.loads(path.read_bytes())["files"]
                found = {file: self.folder.holds(entry, f"{checksum}.{file}") for file, checksum in listed.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self.folder.drop(path, f"cannot be read ({error})")
                continue
            missing = [file for file, where in found.items() if where is None]
            if missing:
                self.folder.drop(path, f"lacks {', '.join(missing)}")
                continue
            return {file: str(where) for file, where in found.items()}
        return None

    def keep_group(self, entry: str, name: str, paths: Mapping[str, str]) -> str:
        """The files that belong together, by name, as :meth:`CacheFolder.write` has placed them."""
        files = {file: Path(path).name[:DIGITS] for file, path in paths.items()}
        content = json.dumps({"files": files}, sort_keys=True).encode()
        return str(self.folder.write(entry, _group_name(name), content))


def _group_name(name: str) -> str:
    return f"__grp__{name}"


class KernelFiles:
    """Triton's cache manager of one compilation, with the names that Triton calls.

    Where ``TRITON_CACHE_DIR`` is set, Triton's own files are used and only counted; what is written for debugging is
    left to Triton altogether.
    """

    cache: ClassVar[KernelCache]

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self.key = key
        self._counts = not (override or dump)
        self._begun = time.perf_counter()
        self._hit = False
        self._triton: Any = None
        if override or dump or os.environ.get("TRITON_CACHE_DIR"):
            from triton.runtime.cache import FileCacheManager

            self._triton = FileCacheManager(key, override=override, dump=dump)

    def has_file(self, filename: str) -> bool:
        return self.get_file(filename) is not None

    def get_file(self, filename: str) -> str | None:
        if self._triton is not None:
            found = self._triton.get_file(filename)
        else:
            found = next(map(str, self.cache.folder.find(self.key, filename)), None)
        if found is not None and filename.endswith(LIBRARIES):
            self._count_hit()
        return None if found is None else str(found)

    def put(self, data: object, filename: str, binary: bool = True) -> str:
        if self._triton is not None:
            path = str(self._triton.put(data, filename, binary))
        else:
            # Modules of the compiler are handed over as they are.
            content = data if isinstance(data, bytes) else str(data).encode()
            path = str(self.cache.folder.write(self.key, filename, content))
        if filename.endswith(LIBRARIES):
            self._count_compiled(filename)
        return path

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self._triton is not None:
            group: dict[str, str] | None = self._triton.get_group(filename)
        else:
            group = self.cache.group(self.key, filename)
        if group and filename in group:
            self._count_hit()
        return group

    def put_group(self, filename: str, group: Mapping[str, str]) -> str:
        if self._triton is not None:
            path = str(self._triton.put_group(filename, group))
        else:
            path = self.cache.keep_group(self.key, filename, group)
        self._count_compiled(filename)
        return path

    def _count_hit(self) -> None:
        if self._counts and not self._hit:
            self._hit = True
            self.cache.count_hit()

    def _count_compiled(self, filename: str) -> None:
        if self._counts:
            self.cache.count_compiled(filename.partition(".")[0], time.perf_counter() - self._begun)


def install(backend: str, devices: Sequence[str]) -> KernelCache | None:
    """Let Triton read and keep kernels in the cache of ``backend`` for devices of these names; returns it.

    One that is installed already for the same folder is returned as it is. None where a cache manager of the user's
    own is set.

    Raises:
        ConfigurationError: ``POLYACCEL_CACHE_BYTES`` is no number.
    """
    import triton
    from triton.runtime.cache import CacheManager

    knobs = triton.knobs.cache
    fields = key_fields(devices, triton.__version__)
    current = knobs.manager_class
    if current is not None:
        shared = getattr(current, "cache", None)
        if not isinstance(shared, KernelCache):
            logger.info("kernels are kept by %s, which Triton was told to use", current.__name__)
            return None
        if shared.folder.path == cache_root() / backend / key_of(fields):
            return shared
    cache = KernelCache(CacheFolder(backend, fields))
    # Not the knob of Triton's folder: it would be handed on to child processes as if the user had set it.
    knobs.manager_class = type("PolyaccelKernelFiles", (KernelFiles, CacheManager), {"cache": cache})
    return cache
