from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polyaccel.backend.errors import ModelLoadError
from polyaccel.weights.checkpoint import open_checkpoint
from polyaccel.weights.safetensors_checkpoint import SafetensorsCheckpoint

SHARDS = {
    "model-1.safetensors": {"a": torch.ones(4, 2), "b": torch.zeros(3)},
    "model-2.safetensors": {"c": torch.ones(1)},
}


def folder(path: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], weight_map: object = None) -> Path:
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        save_file(dict(tensors), path / name)
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_a_single_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        assert checkpoint.names() == ("a",)
        assert (checkpoint.shape("a"), checkpoint.dtype("a"), checkpoint.nbytes("a")) == ((2, 3), torch.float32, 24)
        assert checkpoint.read("a", slice(1, 2)).tolist() == [[3.0, 4.0, 5.0]]
        assert checkpoint.hf_config() == {"model_type": "llama"}
        assert checkpoint.generation_config() == {"eos_token_id": [1, 2]}
    with pytest.raises(ModelLoadError, match=r"after close\(\)"):
        checkpoint.read("a")


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(folder(tmp_path, SHARDS))
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    for tensors in SHARDS.values():
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.generation_config() == {}
    with pytest.raises(ModelLoadError, match="no tensor 'd'"):
        checkpoint.read("d")


@pytest.mark.parametrize(
    "shard",
    ["../model-1.safetensors", "/etc/passwd.safetensors", "x/model-1.safetensors", "..", "model-1.bin", 
     "C:\\m.safetensors", ".hidden.safetensors", "a\0.safetensors", 7, None],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, shard: object) -> None:
    folder(tmp_path, SHARDS, {"a": shard})
    with pytest.raises(ModelLoadError, match=r"index\.json: tensor 'a'"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, [], "x", 3])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    folder(tmp_path, SHARDS, weight_map)
    with pytest.raises(ModelLoadError, match="'weight_map' is missing or empty"):
        SafetensorsCheckpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder(tmp_path, SHARDS)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"1 of 2 shards are missing: 'model-2.safetensors'"):
        SafetensorsCheckpoint(tmp_path)


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    promised = {"a": "model-1.safetensors", "b": "model-1.safetensors", "z": "model-2.safetensors"}
    folder(tmp_path, SHARDS, promised)
    with pytest.raises(ModelLoadError, match=r"model-2.safetensors: .* are missing: 'z'"):
        SafetensorsCheckpoint(tmp_path)
    folder(tmp_path, SHARDS, {"a": "model-1.safetensors"})
    with pytest.raises(ModelLoadError, match=r"model-1.safetensors: .* does not put here: 'b'"):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = {
        "model-1.safetensors": {"a": torch.ones(1)},
        "model-2.safetensors": {"a": torch.ones(1), "c": torch.ones(1)},
    }
    folder(tmp_path, shards, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
    with pytest.raises(ModelLoadError, match=r"model-2.safetensors: .* does not put here: 'a'"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("pytorch_model.bin", "only pickle weights .'pytorch_model.bin'.*convert them to safetensors"),
        ("model-00001-of-00002.safetensors", "the checkpoint is incomplete"),
        ("readme.md", "holds no weights"),
    ],
)
def test_a_folder_without_usable_weights_says_why(tmp_path: Path, file: str, reason: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=reason):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("config", [b"", b"[]", b"\xff", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_broken_configuration_is_refused_by_name(tmp_path: Path, config: bytes) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_the_fingerprint_depends_on_contents_and_not_on_the_path(tmp_path: Path) -> None:
    prints = []
    for index, value in enumerate((0.0, 0.0, 1.0)):
        (tmp_path / str(index)).mkdir()
        shards = {"model-1.safetensors": {"a": torch.full((100,), value)}}
        prints.append(SafetensorsCheckpoint(folder(tmp_path / str(index), shards)).fingerprint())
    assert prints[0] == prints[1] != prints[2]
