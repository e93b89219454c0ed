"""The folder in which compiled kernels outlive a process: files whose names hold the checksum of what is in them.

``<root>/<backend>/<key>/manifest.json`` says for what the kernels below ``kernels/<entry>/`` were compiled. A file is
``<checksum>.<name>``, written under another name and renamed, and never changed: whoever sees it sees all of it, and
processes that write the same at once write the same file. The checksum covers key, entry and name besides the content:
a file which came from elsewhere is told from one that belongs here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

from polyaccel.backend.errors import BackendError, ConfigurationError

FORMAT = "polyaccel kernels 1"
LIMIT_BYTES = 2 << 30
DIGITS = 32
"""Hexadecimal digits of a checksum."""
STALE_SECONDS = 3600.0
"""After which a file that was never renamed belongs to nobody."""

logger = logging.getLogger("polyaccel.cuda")


def cache_root() -> Path:
    """``POLYACCEL_CACHE``, else ``polyaccel`` below ``XDG_CACHE_HOME`` or ``~/.cache``. It need not exist."""
    chosen = os.environ.get("POLYACCEL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        # A user without a home folder, as containers have them: what is below / cannot be written, which is no error.
        base = os.path.join(os.sep, os.path.expanduser("~").removeprefix("~"), ".cache")
    return Path(base) / "polyaccel"


def cache_limit() -> int:
    """Bytes that the kernels of all keys may take together: ``POLYACCEL_CACHE_BYTES``, else 2 GiB.

    Raises:
        ConfigurationError: the variable is no number of bytes.
    """
    text = os.environ.get("POLYACCEL_CACHE_BYTES")
    if not text:
        return LIMIT_BYTES
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(
            f"POLYACCEL_CACHE_BYTES={text!r} is not a number of bytes; unset it for {LIMIT_BYTES} (2 GiB)"
        )
    return int(text)


def key_of(fields: Mapping[str, str]) -> str:
    """The folder's name for kernels of these fields: 24 hexadecimal digits."""
    text = json.dumps([FORMAT, dict(fields)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class CacheFolder:
    """The kernels of one key. What cannot be written there is kept in a folder of this process until :meth:`close`.

    Args:
        backend: its name.
        fields: what the key is made of.
        root: of all backends; default :func:`cache_root`.
        limit: bytes; default :func:`cache_limit`.
    """

    def __init__(
        self, backend: str, fields: Mapping[str, str], *, root: Path | None = None, limit: int | None = None
    ) -> None:
        self.fields = dict(fields)
        self.key = key_of(fields)
        self.path = (root if root is not None else cache_root()) / backend / self.key
        self._limit = limit if limit is not None else cache_limit()
        self._writable = True
        self._trimmed = False
        self._reported: set[Path] = set()
        self._lock = threading.Lock()
        self._private: Path | None = None
        self._remove_private: weakref.finalize[[str, bool], CacheFolder] | None = None
        self._open()

    def _open(self) -> None:
        """Note that the key is used; write its manifest if it has none, or a wrong one."""
        manifest = self.path / "manifest.json"
        try:
            found = json.loads(manifest.read_bytes())
            right = isinstance(found, dict) and (found.get("format"), found.get("fields")) == (FORMAT, self.fields)
            if not right:
                logger.warning("%s is not of this key; it is written anew", manifest)
        except FileNotFoundError:
            right = False
        except (OSError, ValueError) as error:
            right = False
            logger.warning("%s cannot be read (%s); it is written anew", manifest, error)
        try:
            if right:
                os.utime(manifest)
            else:
                text = json.dumps({"format": FORMAT, "fields": self.fields, "created": time.time()}, indent=2)
                _write(manifest, text.encode())
        except OSError:
            # Of an image, say. Kernels that are there are read; the first that is missing says that it is not kept.
            return

    # -- reading -----------------------------------------------------------------------------------------------------

    def find(self, entry: str, name: str) -> Iterator[Path]:
        """Every file of this name in an entry whose content is what its own name says.

        Others are reported once, and removed where that is possible.
        """
        for folder in self._folders(entry):
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                continue
            for file in names:
                if file.startswith("."):
                    continue
                if file[DIGITS : DIGITS + 1] != "." or set(file[:DIGITS]) - set("0123456789abcdef"):
                    self._drop(folder / file, "does not belong there")
                elif file[DIGITS + 1 :] == name and self._is_right(folder / file, entry):
                    yield folder / file

    def holds(self, entry: str, file: str) -> Path | None:
        """The file of this full name, checksum included, if it is there and right."""
        for folder in self._folders(entry):
            if self._is_right(folder / file, entry):
                return folder / file
        return None

    def drop(self, path: Path, why: str) -> None:
        """Report a file once, and remove it where that is possible."""
        self._drop(path, why)

    def _folders(self, entry: str) -> list[Path]:
        return [root / "kernels" / entry for root in (self.path, self._private) if root is not None]

    def _is_right(self, path: Path, entry: str) -> bool:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._drop(path, f"cannot be read ({error})")
            return False
        checksum, _, name = path.name.partition(".")
        if self._checksum(entry, name, content) != checksum:
            self._drop(path, "is damaged, or comes from elsewhere")
            return False
        return True

    def _drop(self, path: Path, why: str) -> None:
        if path in self._reported:
            return
        self._reported.add(path)
        logger.warning("%s %s: it is not used, and compiled again where it is needed", path, why)
        try:
            path.unlink()
        except OSError:
            return

    def _checksum(self, entry: str, name: str, content: bytes) -> str:
        head = "\0".join((self.key, entry, name, "")).encode()
        return hashlib.sha256(head + content).hexdigest()[:DIGITS]

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, entry: str, name: str, content: bytes) -> Path:
        """Keep a file of an entry; returns where it is.

        Raises:
            BackendError: neither the cache nor the system's temporary folder can be written.
        """
        file = f"{self._checksum(entry, name, content)}.{name}"
        if self._writable:
            path = self.path / "kernels" / entry / file
            try:
                _write(path, content)
            except OSError as error:
                self._writable = False
                logger.warning("%s cannot be written (%s): kernels are kept for this process only", self.path, error)
            else:
                self._reported.discard(path)
                self._trim()
                return path
        try:
            path = self._private_folder() / "kernels" / entry / file
            _write(path, content)
        except OSError as error:
            raise BackendError(
                f"a compiled kernel cannot be kept: neither {self.path} nor a temporary folder can be written ({error})"
                "; set POLYACCEL_CACHE or TMPDIR to a folder that can"
            ) from error
        return path

    def _private_folder(self) -> Path:
        with self._lock:
            if self._private is None:
                self._private = Path(tempfile.mkdtemp(prefix="polyaccel-kernels-"))
                self._remove_private = weakref.finalize(self, shutil.rmtree, str(self._private), True)
            return self._private

    def close(self) -> None:
        """Remove what was kept for this process only. Idempotent, and files may be written again."""
        if self._remove_private is not None:
            self._remove_private()
        self._private, self._remove_private = None, None

    def _trim(self) -> None:
        """Once a process, when it first adds something: drop what others left, then the keys that were not used for
        longest, until the limit is kept. This key stays, whatever its size."""
        with self._lock:
            if self._trimmed:
                return
            self._trimmed = True
        if not (self.path / "manifest.json").exists():
            # Somebody cleared the cache meanwhile.
            self._open()
        others = []
        total = size_of(self.path)
        for folder in list(self.path.parent.iterdir()):
            if folder.name.startswith(".trash-"):
                shutil.rmtree(folder, ignore_errors=True)
            elif folder != self.path and folder.is_dir():
                others.append((_last_use(folder), size_of(folder), folder))
                total += others[-1][1]
        for _, size, folder in sorted(others, key=lambda other: other[0]):
            if total <= self._limit:
                return
            logger.info("%s: %d bytes are dropped, the cache holds %d of %d", folder, size, total, self._limit)
            remove(folder)
            total -= size


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder. On the way, files that were never renamed and are old are removed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            try:
                status = path.stat()
                if name.startswith(".new-") and time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink()
                else:
                    total += status.st_size
            except OSError:
                continue
    return total


def remove(folder: Path) -> None:
    """Take a key's folder away at once, then its files one by one: nobody sees half of it."""
    trash = folder.with_name(f".trash-{uuid.uuid4().hex}")
    try:
        os.replace(folder, trash)
    except OSError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def _last_use(folder: Path) -> float:
    for path in (folder / "manifest.json", folder):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".new-{uuid.uuid4().hex}")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
