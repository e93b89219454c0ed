"""Whatever happens to a file's bytes, it loads or is refused by type; nothing else, and at no great cost."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from polyaccel.backend.errors import ModelLoadError
from polyaccel.models.config import ModelConfig
from polyaccel.weights.checkpoint import open_checkpoint
from tests.weights.files import write_gguf

LIMIT = 100 << 20
# Byte changes: (position as a share of the file, how many bytes go, what comes instead).
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 16), st.binary(max_size=16)), min_size=1, max_size=4)


def mutate(content: bytes, changes: list[tuple[float, int, bytes]], window: int) -> bytes:
    for share, gone, new in changes:
        at = int(share * min(len(content), window))
        content = content[:at] + new + content[at + gone :]
    return content


def load_everything(path: Path) -> bool:
    """Whether it loads. Any exception but ModelLoadError is a failure of the test."""
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.names():
                tensor = checkpoint.read(name)
                assert tuple(tensor.shape) == checkpoint.shape(name)
                assert tensor.dtype == checkpoint.dtype(name)
            ModelConfig.from_hf(checkpoint.hf_config(), checkpoint.generation_config())
            checkpoint.fingerprint()
    except ModelLoadError:
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < LIMIT, f"{peak} bytes were allocated"
    return True


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(32)], "tokenizer.ggml.scores": [0.5] * 32}
    kind = gguf.GGMLQuantizationType.Q4_0
    return write_gguf(tmp_path_factory.mktemp("fuzz") / "m.gguf", kind=kind, extra=extra)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    shards = {"model-1.safetensors": {"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}}
    shards["model-2.safetensors"] = {"c": torch.ones(2, dtype=torch.int64)}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "eos_token_id": [1, 2],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    return folder


def check(
    source: Path, write_to: Callable[[bytes], Path], changes: list[tuple[float, int, bytes]], window: int
) -> None:
    load_everything(write_to(mutate(source.read_bytes(), changes, window)))


@settings(max_examples=300)
@given(changes=CHANGES, window=st.sampled_from([64, 1500, 4000, 1 << 30]))
@example(changes=[(0.0, 0, b"")], window=64)
def test_a_mutated_gguf_file_loads_or_is_refused(
    gguf_file: Path, changes: list[tuple[float, int, bytes]], window: int
) -> None:
    def write_to(content: bytes) -> Path:
        path = gguf_file.with_name("mutated.gguf")
        path.write_bytes(content)
        return path

    check(gguf_file, write_to, changes, window)


@settings(max_examples=300)
@given(
    name=st.sampled_from(
        ["model-1.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
    ),
    changes=CHANGES,
)
@example(name="config.json", changes=[(0.0, 0, b"")])
def test_a_mutated_folder_loads_or_is_refused(
    model_folder: Path, name: str, changes: list[tuple[float, int, bytes]]
) -> None:
    original = (model_folder / name).read_bytes()

    def write_to(content: bytes) -> Path:
        (model_folder / name).write_bytes(content)
        return model_folder

    try:
        check(model_folder / name, write_to, changes, 1 << 30)
    finally:
        (model_folder / name).write_bytes(original)


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_never_loads(gguf_file: Path, model_folder: Path, share: float) -> None:
    content = gguf_file.read_bytes()
    shorter = gguf_file.with_name("shorter.gguf")
    # NOTE: the writer pads the last tensor, so a cut within the padding would take nothing away.
    shorter.write_bytes(content[: int(share * (len(content) - 32))])
    assert not load_everything(shorter)
    shard = model_folder / "model-1.safetensors"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[: int(share * len(content))])
        assert not load_everything(model_folder)
    finally:
        shard.write_bytes(content)


def test_the_files_load_as_long_as_nothing_is_changed(gguf_file: Path, model_folder: Path) -> None:
    assert load_everything(gguf_file)
    assert load_everything(model_folder)
