"""A PEFT folder on disk, opened without PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Opening reads the two headers and makes views of the mapped file; values are only touched by whoever reads the views.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from polyaccel.backend.errors import AdapterIncompatible, AdapterNotFound
from polyaccel.lora.adapter_config import AdapterConfig
from polyaccel.lora.numbers import MAX_RANK, RankNumbers
from polyaccel.lora.pattern import MAX_NAME
from polyaccel.lora.stacked import is_stacked, parameter_of, split_stacked
from polyaccel.lora.target import Kind
from polyaccel.weights.safetensors_file import SafetensorsFile

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
MAX_TENSORS = 1 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<stem>.+)\.lora_(?P<embedding>embedding_)?(?P<matrix>[AB])(?:\.weight)?")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})(?:\.|$)")

# Part of a tensor's name -> the feature that put it there.
_REFUSED_TENSORS = (
    ("lora_magnitude_vector", "DoRA"),
    ("modules_to_save", "modules_to_save"),
    ("token_adapter", "trainable_token_indices"),
    ("trainable_tokens", "trainable_token_indices"),
    ("lora_A.bias", "LoRA bias"),
    ("lora_B.bias", "LoRA bias"),
    ("lora_diag", "KaSA"),
    ("lora_E", "AdaLoRA"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraPair:
    """One module's adapter as trained: ``a: [rank, in]``, ``b: [out, rank]``, float32, float16 or bfloat16, unscaled.

    For an embedding ``in`` is the vocabulary and ``out`` the hidden size. The tensors are views of the mapped file
    and must not be written. ``experts`` is the number of experts of the stacked tensor the pair was cut from, else
    None; ``tensors`` names the file's tensors for messages.
    """

    module: str
    kind: Kind
    expert: int | None
    a: torch.Tensor
    b: torch.Tensor
    numbers: RankNumbers
    experts: int | None
    tensors: tuple[str, str]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors in the file's dtype."""
        return self.a.numel() * self.a.element_size() + self.b.numel() * self.b.element_size()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterFile:
    """An opened adapter.

    ``pairs`` maps module names (the wrapper's prefix removed) to their matrices, in name order. ``unknown`` are tensors
    that are no LoRA matrices; ``base_copies`` are (module, shape) of base weights that PEFT saved beside an embedding's
    or lm_head's adapter, which are not read. ``notes`` are remarks for the receipt.
    """

    path: Path
    config: AdapterConfig
    pairs: dict[str, LoraPair]
    unknown: tuple[str, ...]
    base_copies: tuple[tuple[str, tuple[int, ...]], ...]
    notes: tuple[str, ...]
    nbytes: int
    open_seconds: float

    @classmethod
    def open(cls, path: str | Path) -> AdapterFile:
        """Open and check a PEFT folder; headers only.

        Raises:
            AdapterNotFound: no such folder.
            AdapterIncompatible: a damaged or hostile file, a refused feature, shapes or ranks that disagree.
        """
        started = time.perf_counter()
        folder = Path(path)
        if not folder.is_dir():
            raise AdapterNotFound(f"no adapter folder {str(folder)!r}; a PEFT folder holds {CONFIG_NAME}")
        config = AdapterConfig.read(folder / CONFIG_NAME)
        file = SafetensorsFile(_tensors_path(folder), error=AdapterIncompatible)
        names = sorted(file.names())
        if len(names) > MAX_TENSORS:
            raise AdapterIncompatible(f"{folder} holds {len(names)} tensors; at most {MAX_TENSORS} are read")
        stems, rest = _group(names, folder)
        unknown, copies = _sort_rest(rest, stems, file)
        pairs: dict[str, LoraPair] = {}
        for stem, parts in stems.items():
            for pair in _pairs_of(stem, parts, stems, config, file):
                if pair.module in pairs:
                    raise AdapterIncompatible(f"{folder}: two adapters for module {pair.module!r}")
                pairs[pair.module] = pair
        if config.ensure_weight_tying and not _tied_complete(pairs):
            raise AdapterIncompatible(
                f"{folder}: ensure_weight_tying is set, but the file has no adapter for both embed_tokens and lm_head"
            )
        return cls(
            path=folder,
            config=config,
            pairs=pairs,
            unknown=unknown,
            base_copies=copies,
            notes=_missing_targets(config, pairs),
            nbytes=sum(pair.nbytes for pair in pairs.values()),
            open_seconds=time.perf_counter() - started,
        )


def _tensors_path(folder: Path) -> Path:
    path = folder / TENSORS_NAME
    if path.is_file():
        return path
    for pickled in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth"):
        if (folder / pickled).exists():
            raise AdapterIncompatible(
                f"{folder} holds {pickled}, a pickle file, which can run code when it is read and is never opened; "
                f"save the adapter as {TENSORS_NAME}"
            )
    raise AdapterIncompatible(f"{folder} holds no {TENSORS_NAME}")


def _group(names: Sequence[str], folder: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Tensor names by module stem and matrix, and the names that are no LoRA matrices."""
    stems: dict[str, dict[str, str]] = {}
    rest: list[str] = []
    for name in names:
        for part, feature in _REFUSED_TENSORS:
            if part in name:
                raise AdapterIncompatible(f"{folder}: tensor {name!r:.200} belongs to {feature}; this is not supported")
        match = _TENSOR.fullmatch(name)
        if match is None:
            rest.append(name)
            continue
        stem = match["stem"].removeprefix(_PREFIX)
        if len(stem) > MAX_NAME:
            raise AdapterIncompatible(f"{folder}: module name of {len(stem)} characters; at most {MAX_NAME} are read")
        parts = stems.setdefault(stem, {})
        matrix = ("embedding_" if match["embedding"] else "") + match["matrix"]
        if matrix in parts:
            raise AdapterIncompatible(f"{folder}: {parts[matrix]!r} and {name!r} are the same matrix")
        parts[matrix] = name
    return stems, rest


def _sort_rest(
    rest: Sequence[str], stems: dict[str, dict[str, str]], file: SafetensorsFile
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    unknown: list[str] = []
    copies: list[tuple[str, tuple[int, ...]]] = []
    for name in rest:
        module = name.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
        if name.endswith(".base_layer.weight") and module in stems:
            copies.append((module, tuple(file.shape(name))))
        elif name.endswith(".bias"):
            raise AdapterIncompatible(f"tensor {name!r:.200} is a trained bias; only bias='none' is supported")
        else:
            unknown.append(name)
    return tuple(unknown), tuple(copies)


def _pairs_of(
    stem: str,
    parts: dict[str, str],
    stems: dict[str, dict[str, str]],
    config: AdapterConfig,
    file: SafetensorsFile,
) -> list[LoraPair]:
    kind: Kind = "embedding" if "embedding_A" in parts or "embedding_B" in parts else "linear"
    wanted = ("embedding_A", "embedding_B") if kind == "embedding" else ("A", "B")
    if set(parts) != set(wanted):
        raise AdapterIncompatible(f"module {stem!r} needs exactly lora_{wanted[0]} and lora_{wanted[1]}, has {parts}")
    names = (parts[wanted[0]], parts[wanted[1]])
    for name in names:
        _check_tensor(name, tuple(file.shape(name)), file.dtype(name))
    a, b = (file.read(name) for name in names)
    module, parameter = parameter_of(stem, stems, config.target_parameters)
    if parameter is not None and is_stacked(parameter):
        experts, split = split_stacked(module, parameter, a, b, config.rank_of(f"{module}.{parameter}"), names)
        numbers = config.numbers(f"{module}.{parameter}", split[0].a.shape[0])
        return [
            LoraPair(
                module=part.module,
                kind="linear",
                expert=part.expert,
                a=part.a,
                b=part.b,
                numbers=numbers,
                experts=experts,
                tensors=names,
            )
            for part in split
        ]
    rank = a.shape[0]
    if b.shape[1] != rank:
        raise AdapterIncompatible(
            f"module {module!r}: {names[0]!r} has shape {list(a.shape)} (rank {rank}) but {names[1]!r} has "
            f"{list(b.shape)} (rank {b.shape[1]})"
        )
    if rank > MAX_RANK:
        raise AdapterIncompatible(f"module {module!r} has rank {rank}; at most {MAX_RANK} is supported")
    found = _EXPERT.search(module)
    return [
        LoraPair(
            module=module,
            kind=kind,
            expert=int(found[1]) if found else None,
            a=a,
            b=b,
            numbers=config.numbers(module if parameter is None else f"{module}.{parameter}", rank),
            experts=None,
            tensors=names,
        )
    ]


def _check_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if len(shape) != 2 or 0 in shape:
        raise AdapterIncompatible(f"tensor {name!r} has shape {list(shape)}; a non-empty matrix is expected")
    if dtype not in DTYPES:
        raise AdapterIncompatible(f"tensor {name!r} has dtype {dtype}; float32, float16 and bfloat16 are supported")


def _tied_complete(pairs: dict[str, LoraPair]) -> bool:
    embeddings = any(pair.kind == "embedding" for pair in pairs.values())
    heads = any(module.rpartition(".")[2] == "lm_head" for module in pairs)
    return embeddings == heads


def _missing_targets(config: AdapterConfig, pairs: dict[str, LoraPair]) -> tuple[str, ...]:
    if not isinstance(config.target_modules, tuple):
        return ()
    # Each suffix of each name at a dot, so that a config naming every module costs no quadratic search.
    suffixes = {name[i:] for name in pairs for i in (0, *(m.end() for m in re.finditer(r"\.", name)))}
    missing = sorted(set(config.target_modules) - suffixes)
    return tuple(f"adapter_config.json targets {name!r}, but the file holds no tensors for it" for name in missing)
