from __future__ import annotations

from pathlib import Path

import pytest

from polyaccel.backend.errors import ModelNotFound
from polyaccel.weights.locate import locate_model


def cached(cache: Path, revision: str = "abc123", *, config: bool = True) -> Path:
    repository = cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(f"{revision}\n")
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    if config:
        (snapshot / "config.json").write_text("{}")
    return snapshot


def test_a_folder_with_a_configuration_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = locate_model(tmp_path)
    assert (files.kind, files.path, files.name) == ("folder", tmp_path, str(tmp_path))
    assert files.file("config.json") == tmp_path / "config.json"
    assert files.file("tokenizer.json") is None


def test_a_gguf_file_is_a_model_without_companions(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    files = locate_model(str(tmp_path / "m.gguf"))
    assert (files.kind, files.path) == ("gguf", tmp_path / "m.gguf")
    assert files.file("config.json") is None


def test_a_folder_with_one_gguf_file_stands_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert locate_model(tmp_path).path == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"2 GGUF files \(m.gguf, n.gguf\)"):
        locate_model(tmp_path)


def test_an_adapter_folder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="is an adapter, not a model"):
        locate_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["", "  ", "a\0b", "../nowhere/at/all", "/nowhere", "a/b/c", "x.gguf", "x.safetensors"]
)
def test_what_is_neither_a_path_nor_a_hub_id_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound):
        locate_model(name, environ={"HF_HUB_CACHE": "/nowhere"})


def test_a_safetensors_file_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"the folder that also holds config.json"):
        locate_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HOME", ".cache/huggingface/hub"),
    ],
)
def test_a_hub_id_is_found_in_the_cache_that_the_environment_selects(tmp_path: Path, variable: str, below: str) -> None:
    snapshot = cached(tmp_path / below)
    files = locate_model("some/model", environ={variable: str(tmp_path)})
    assert (files.kind, files.path, files.name) == ("folder", snapshot, "some/model")


def test_a_missing_hub_id_names_the_download_command(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="hf download some/model"):
        locate_model("some/model", environ={"HF_HUB_CACHE": str(tmp_path)})


@pytest.mark.parametrize("revision", ["other", "../../../etc", "", "a/b"])
def test_a_reference_to_no_snapshot_names_the_download_command(tmp_path: Path, revision: str) -> None:
    cached(tmp_path, revision)
    with pytest.raises(ModelNotFound, match="hf download some/model"):
        locate_model("some/model", environ={"HF_HUB_CACHE": str(tmp_path)})


def test_an_incomplete_download_names_the_download_command(tmp_path: Path) -> None:
    cached(tmp_path, config=False)
    with pytest.raises(ModelNotFound, match="may be incomplete, run: hf download some/model"):
        locate_model("some/model", environ={"HF_HUB_CACHE": str(tmp_path)})
