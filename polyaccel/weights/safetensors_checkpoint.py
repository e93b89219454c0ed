"""A Hugging Face folder: config.json and one or many safetensors files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from polyaccel.backend.errors import ModelLoadError
from polyaccel.weights.checkpoint import Checkpoint, as_path
from polyaccel.weights.json_file import read_json_object
from polyaccel.weights.safetensors_file import SafetensorsFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SafetensorsCheckpoint(Checkpoint):
    """The checkpoint in a Hugging Face folder.

    Reads ``model.safetensors``, else the shards that ``model.safetensors.index.json`` lists. All headers are validated
    on opening: shards and tensors that the index promises must exist, and shards hold nothing that it does not list.
    Raises ModelLoadError; pickle files are never opened.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = as_path(folder)
        self._config = read_json_object(self.folder / "config.json")
        generation = self.folder / "generation_config.json"
        self._generation = read_json_object(generation) if generation.is_file() else {}
        self._files: tuple[SafetensorsFile, ...]
        self._where: dict[str, SafetensorsFile]
        if (self.folder / _SINGLE).is_file():
            file = SafetensorsFile(self.folder / _SINGLE)
            self._files, self._where = (file,), dict.fromkeys(file.names(), file)
        elif (self.folder / _INDEX).is_file():
            self._files, self._where = _open_shards(self.folder)
        else:
            raise ModelLoadError(_explain_missing(self.folder))

    def names(self) -> tuple[str, ...]:
        return tuple(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file(name).dtype(name)

    def nbytes(self, name: str) -> int:
        return self._file(name).nbytes(name)

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        return self._file(name).read(name, rows, cols)

    def hf_config(self) -> dict[str, object]:
        return dict(self._config)

    def generation_config(self) -> dict[str, object]:
        return dict(self._generation)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._config, sort_keys=True).encode())
        for file in self._files:
            digest.update(file.digest())
        return digest.hexdigest()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _file(self, name: str) -> SafetensorsFile:
        file = self._where.get(name)
        if file is None:
            raise ModelLoadError(f"{self.folder}: there is no tensor {name!r}")
        return file


def _open_shards(folder: Path) -> tuple[tuple[SafetensorsFile, ...], dict[str, SafetensorsFile]]:
    index = folder / _INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: 'weight_map' is missing or empty")
    promised: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise ModelLoadError(
                f"{index}: tensor {name[:200]!r} is said to be in {str(shard)[:200]!r}, "
                "which is not the name of a .safetensors file in this folder"
            )
        promised.setdefault(shard, []).append(name)
    missing = [shard for shard in promised if not (folder / shard).is_file()]
    if missing:
        raise ModelLoadError(f"{folder}: {len(missing)} of {len(promised)} shards are missing: {_some(missing)}")
    where: dict[str, SafetensorsFile] = {}
    files: list[SafetensorsFile] = []
    for shard in sorted(promised):
        file = SafetensorsFile(folder / shard)
        files.append(file)
        held = dict.fromkeys(file.names())
        absent = [name for name in promised[shard] if name not in held]
        if absent:
            raise ModelLoadError(f"{file.path}: tensors that the index puts here are missing: {_some(absent)}")
        extra = [name for name in held if weight_map.get(name) != shard]
        if extra:
            raise ModelLoadError(f"{file.path}: tensors that the index does not put here: {_some(extra)}")
        where.update(dict.fromkeys(held, file))
    return tuple(files), where


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(mark in name for mark in ("/", "\\", ":", "\0")) and name[0] != "."


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:200]) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _explain_missing(folder: Path) -> str:
    files = sorted(child.name for child in folder.iterdir())
    pickles = [name for name in files if name.endswith(_PICKLES)]
    others = [name for name in files if name.endswith(".safetensors")]
    if others:
        return f"{folder}: holds {_some(others)} but neither {_SINGLE} nor {_INDEX}; the checkpoint is incomplete"
    if pickles:
        return (
            f"{folder}: holds only pickle weights ({_some(pickles)}), which can run code when opened and are refused; "
            "convert them to safetensors"
        )
    return f"{folder}: holds no weights; expected {_SINGLE} or {_INDEX}"
