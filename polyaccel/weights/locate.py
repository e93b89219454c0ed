"""Finding a model on this machine. Nothing is ever downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyaccel.backend.errors import ModelNotFound

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where a model's files are.

    ``kind`` is "folder" (a Hugging Face folder, ``path`` is the folder) or "gguf" (``path`` is the file). ``name`` is
    what the caller asked for.
    """

    kind: Literal["folder", "gguf"]
    path: Path
    name: str

    def file(self, name: str) -> Path | None:
        """The file ``name`` of a folder, or None where there is none. A GGUF file has no companions."""
        if self.kind != "folder":
            return None
        candidate = self.path / name
        return candidate if candidate.is_file() else None


def locate_model(model: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None) -> ModelFiles:
    """Find ``model``: a folder, a ``.gguf`` file, or a hub id present in the local Hugging Face hub cache.

    The cache is ``HF_HUB_CACHE``, else ``HF_HOME``/hub, else ``~/.cache/huggingface/hub``; the revision is the one that
    ``refs/main`` names. ``environ`` replaces ``os.environ`` (tests).

    Raises ModelNotFound; for a hub id the message holds the command that downloads it.
    """
    name = os.fspath(model)
    if not name.strip() or "\0" in name:
        raise ModelNotFound(f"model {name!r} is neither a path nor a hub id 'owner/name'")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _in_folder(path, name)
        if path.is_file():
            return _single_file(path, name)
    except OSError as error:
        raise ModelNotFound(f"model {name!r} cannot be read: {error}") from error
    if isinstance(model, str) and _HUB_ID.fullmatch(name) and not name.endswith((".gguf", ".safetensors")):
        return _in_hub_cache(name, os.environ if environ is None else environ)
    raise ModelNotFound(f"no such file or folder: {name!r}; pass a model folder, a .gguf file or a hub id 'owner/name'")


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The Hugging Face hub cache folder that ``environ`` selects; it need not exist."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(key):
            return Path(environ[key]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]).expanduser() / "huggingface" / "hub"
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    return home / ".cache" / "huggingface" / "hub"


def _single_file(path: Path, name: str) -> ModelFiles:
    if path.suffix.lower() == ".gguf":
        return ModelFiles(kind="gguf", path=path, name=name)
    raise ModelNotFound(
        f"{name!r} is a file but not a .gguf file; for safetensors pass the folder that also holds config.json"
    )


def _in_folder(path: Path, name: str) -> ModelFiles:
    if (path / "config.json").is_file():
        return ModelFiles(kind="folder", path=path, name=name)
    gguf = sorted(child for child in path.iterdir() if child.suffix.lower() == ".gguf" and child.is_file())
    if len(gguf) == 1:
        return ModelFiles(kind="gguf", path=gguf[0], name=name)
    if gguf:
        listed = ", ".join(child.name for child in gguf[:5])
        raise ModelNotFound(f"folder {name!r} holds {len(gguf)} GGUF files ({listed}); pass the path of one of them")
    if (path / "adapter_config.json").is_file():
        raise ModelNotFound(f"folder {name!r} is an adapter, not a model; load it with adapters={{'name': {name!r}}}")
    raise ModelNotFound(f"folder {name!r} has neither config.json nor a .gguf file; it is not a model folder")


def _in_hub_cache(name: str, environ: Mapping[str, str]) -> ModelFiles:
    cache = hub_cache(environ)
    command = f"hf download {name}"
    repository = cache / ("models--" + name.replace("/", "--"))
    if not repository.is_dir():
        raise ModelNotFound(
            f"model {name!r} is no folder here and not in the hub cache {cache}; nothing is downloaded silently. "
            f"To download it: {command}"
        )
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelNotFound(f"the hub cache has {name!r} but no readable refs/main; run: {command}") from error
    if not _REVISION.fullmatch(revision):
        raise ModelNotFound(f"refs/main of {name!r} in the hub cache is {revision[:60]!r}; run: {command}")
    snapshot = repository / "snapshots" / revision
    if not snapshot.is_dir():
        raise ModelNotFound(f"revision {revision} of {name!r} is not in the hub cache {cache}; run: {command}")
    try:
        return _in_folder(snapshot, name)
    except ModelNotFound as error:
        raise ModelNotFound(f"{error}; the download may be incomplete, run: {command}") from error
