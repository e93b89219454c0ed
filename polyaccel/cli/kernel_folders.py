"""Kernel caches of installed and removed backends alike, found by the folders' convention: no plugin is imported.

``<root>/<backend>/<key>/manifest.json`` holds ``fields`` (what the key is made of) and ``created``;
``kernels/<entry>/`` holds the files of one kernel, ``<checksum>.<kernel>.<kind>`` each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from polyaccel.backend.errors import ConfigurationError

KEY = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFolder:
    """The kernels of one backend and key.

    Attributes:
        fields: of the key, by name; empty where the manifest cannot be read.
        created, used: seconds since 1970; the manifest's time stamp says when a process last used the key.
        problem: why the manifest says nothing; empty if it does.
    """

    backend: str
    key: str
    path: Path
    fields: dict[str, str]
    created: float
    used: float
    problem: str = ""

    def entries(self) -> dict[str, str]:
        """The kernel's name by entry."""
        found: dict[str, str] = {}
        for entry in _folders(self.path / "kernels"):
            names = [file.name.split(".") for file in entry.iterdir() if not file.name.startswith(".")]
            kernels = sorted(parts[1] for parts in names if len(parts) > 2 and not parts[1].startswith("__grp__"))
            if kernels:
                found[entry.name] = kernels[0]
        return found

    def size(self) -> int:
        """Bytes of all its files."""
        return sum(_size(Path(place) / name) for place, _, names in os.walk(self.path) for name in names)

    def remove(self) -> None:
        """Take the folder away at once, then its files: a process that runs never sees half of it.

        Raises:
            ConfigurationError: the folder cannot be removed; nothing of it has been.
        """
        trash = self.path.with_name(f".trash-{uuid.uuid4().hex}")
        try:
            os.replace(self.path, trash)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be removed ({error.strerror}); do it as the user who may write there"
            ) from error
        shutil.rmtree(trash, ignore_errors=True)


def cache_root() -> Path:
    """``POLYACCEL_CACHE``, else ``polyaccel`` below ``XDG_CACHE_HOME`` or ``~/.cache``, as backends choose it."""
    chosen = os.environ.get("POLYACCEL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.sep, os.path.expanduser("~").removeprefix("~"), ".cache")
    return Path(base) / "polyaccel"


def kernel_folders(backend: str | None = None, root: Path | None = None) -> list[KernelFolder]:
    """All caches, or those of one backend, the last used first within a backend."""
    found = []
    for home in _folders(root if root is not None else cache_root()):
        if backend is None or home.name == backend:
            found += [_read(folder) for folder in _folders(home) if _is_cache(folder)]
    return sorted(found, key=lambda cache: (cache.backend, -cache.used, cache.key))


def _is_cache(folder: Path) -> bool:
    # Whatever else lies in a folder that the variable may name is not touched.
    return KEY.fullmatch(folder.name) is not None and (folder / "manifest.json").is_file()


def _read(folder: Path) -> KernelFolder:
    fields: dict[str, str] = {}
    problem = ""
    status = (folder / "manifest.json").stat()
    created = status.st_mtime
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        fields = {str(name): str(value) for name, value in manifest["fields"].items()}
        created = float(manifest["created"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"its manifest cannot be read: {type(error).__name__}: {error}"
    return KernelFolder(
        backend=folder.parent.name,
        key=folder.name,
        path=folder,
        fields=fields,
        created=created,
        used=status.st_mtime,
        problem=problem,
    )


def _folders(place: Path) -> Iterator[Path]:
    try:
        inside = sorted(place.iterdir())
    except OSError:
        return
    yield from (path for path in inside if path.is_dir() and not path.name.startswith("."))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
