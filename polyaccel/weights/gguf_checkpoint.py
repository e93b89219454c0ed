"""A GGUF file as a checkpoint with Hugging Face names and layouts."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend.errors import ModelLoadError
from polyaccel.weights.checkpoint import Checkpoint, slice_bounds
from polyaccel.weights.gguf_config import architecture_of, hf_config
from polyaccel.weights.gguf_dequantize import GGUFType, dequantize
from polyaccel.weights.gguf_file import GGUFFile
from polyaccel.weights.gguf_names import Source, half_split_rows, translate

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFCheckpoint(Checkpoint):
    """The checkpoint in one GGUF file (architectures llama, mistral, qwen2, qwen3; Mixtral is llama with experts).

    F32, F16 and BF16 are read as they are, quantised tensors as float32. Q and K of the llama layout come back with the
    rotary halves apart, as in Hugging Face checkpoints. Attribute ``file``: metadata (the tokenizer is in there too).
    Raises ModelLoadError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = GGUFFile(path)
        what = str(self.file.path)
        architecture = architecture_of(self.file)
        self._sources = translate(self.file.tensors.values(), architecture, what)
        self._config = hf_config(self.file, architecture, self._sources)
        self._head_dim = self._check_heads(what)

    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return _STORED.get(self._source(name).tensor.type.name, torch.float32)

    def nbytes(self, name: str) -> int:
        source = self._source(name)
        kind = source.tensor.type
        return int(np.prod(source.shape, dtype=np.int64)) // kind.block * kind.block_bytes

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        source = self._source(name)
        what = f"{self.file.path}: tensor {name!r} of shape {list(source.shape)}"
        raw, kind = self.file.raw(source.tensor), source.tensor.type
        if len(source.shape) == 1:
            if cols is not None:
                raise ModelLoadError(f"{what}: it has too few dimensions to be sliced")
            first, last = slice_bounds(rows, source.shape[0], what)
            vector = _values(raw, kind)[0]
            if source.permuted is None:
                return vector[first:last]
            return vector[torch.from_numpy(half_split_rows(first, last, self._head_dim))]
        first, last = slice_bounds(rows, source.shape[0], what)
        left, right = slice_bounds(cols, source.shape[1], what)
        if source.permuted is None:
            picked = raw[source.first_row + first : source.first_row + last]
        else:
            picked = raw[half_split_rows(first, last, self._head_dim)]
        begin, end = left // kind.block, -(-right // kind.block)
        values = _values(picked[:, begin * kind.block_bytes : end * kind.block_bytes], kind)
        return values[:, left - begin * kind.block : right - begin * kind.block]

    def hf_config(self) -> dict[str, object]:
        return dict(self._config)

    def generation_config(self) -> dict[str, object]:
        return {}

    def fingerprint(self) -> str:
        return self.file.digest().hex()

    def close(self) -> None:
        self.file.close()

    def _source(self, name: str) -> Source:
        source = self._sources.get(name)
        if source is None:
            raise ModelLoadError(f"{self.file.path}: there is no tensor {name!r}")
        return source

    def _check_heads(self, what: str) -> int:
        head_dim = self._config["head_dim"]
        permuted = [source for source in self._sources.values() if source.permuted]
        if not isinstance(head_dim, int) or (permuted and (head_dim < 2 or head_dim % 2)):
            raise ModelLoadError(f"{what}: head dimension {head_dim} is not a positive even number")
        for source in permuted:
            heads = self._config["num_attention_heads" if source.permuted == "q" else "num_key_value_heads"]
            if not isinstance(heads, int) or source.shape[0] != heads * head_dim:
                raise ModelLoadError(
                    f"{what}: tensor {source.tensor.name!r} has {source.shape[0]} rows, "
                    f"expected {heads} heads of {head_dim}"
                )
        return head_dim


def _values(raw: npt.NDArray[np.uint8], kind: GGUFType) -> torch.Tensor:
    """Stored rows as a tensor [rows, columns]: a view of the map for plain types that are aligned, else new memory."""
    if kind.is_quantised:
        return torch.from_numpy(dequantize(raw, kind))
    dtype = _STORED[kind.name]
    if raw.ctypes.data % dtype.itemsize or raw.strides[0] % dtype.itemsize:
        raw = raw.copy()
    if raw.size == 0:
        return torch.empty(raw.shape[0], raw.shape[1] // dtype.itemsize, dtype=dtype)
    return torch.from_numpy(raw).view(dtype)
