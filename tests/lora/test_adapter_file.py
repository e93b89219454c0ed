from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import AdapterError, AdapterIncompatible, AdapterNotFound
from polyaccel.lora.adapter_file import AdapterFile
from polyaccel.lora.match import match_adapter
from polyaccel.lora.pack import pack_adapter
from tests.lora.folders import PREFIX, llama_targets, random_matrices, write_folder

A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
B = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"


def plain(rank: int = 8) -> dict[str, torch.Tensor]:
    return {A: torch.ones(rank, 72), B: torch.ones(72, rank)}


def test_modules_are_named_as_in_the_checkpoint_and_ordered(tmp_path: Path) -> None:
    file = AdapterFile.open(write_folder(tmp_path, random_matrices(8, seed=3)))
    assert list(file.pairs) == sorted(file.pairs)
    assert "model.layers.0.self_attn.q_proj" in file.pairs
    embedding = file.pairs["model.embed_tokens"]
    assert (embedding.kind, embedding.in_features, embedding.out_features) == ("embedding", 50, 72)
    assert file.nbytes == sum(tensor.numel() * 4 for tensor in random_matrices(8, seed=3).values())
    assert not file.unknown
    assert not file.notes


def test_a_folder_that_does_not_exist_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="missing"):
        AdapterFile.open(tmp_path / "missing")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_file_is_never_opened(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, plain())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    with pytest.raises(AdapterIncompatible, match=r"pickle.*never opened"):
        AdapterFile.open(tmp_path)


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, plain())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterIncompatible, match=r"holds no adapter_model\.safetensors"):
        AdapterFile.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_folder(tmp_path, plain()) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterIncompatible, match=r"adapter_model\.safetensors"):
        AdapterFile.open(tmp_path)


def raw_safetensors(path: Path, header: object, data: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    "header",
    [
        {A: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
        {A: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 2**62]}},
        {A: {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]}},
        {A: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, B: {"dtype": "F32", "shape": [2, 2]}},
        {
            A: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            B: {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16]},
        },
    ],
    ids=["huge", "offsets", "negative", "no offsets", "overlap"],
)
def test_a_hostile_header_is_refused_before_anything_is_allocated(tmp_path: Path, header: object) -> None:
    write_folder(tmp_path, plain())
    raw_safetensors(tmp_path / "adapter_model.safetensors", header, bytes(16))
    with pytest.raises(AdapterIncompatible):
        AdapterFile.open(tmp_path)


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = random_matrices(4, seed=2, dtype=torch.float16)
    return write_folder(tmp_path_factory.mktemp("sound"), tensors, r=4, rank_pattern={"x": 3})


@given(data=st.data())
def test_a_folder_with_any_bytes_changed_is_loaded_or_refused_with_a_typed_error(
    sound_folder: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray((sound_folder / name).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith("safetensors") else len(content)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as changed:
        for path in sound_folder.iterdir():
            (Path(changed) / path.name).write_bytes(content if path.name == name else path.read_bytes())
        with contextlib.suppress(AdapterError):
            matched = match_adapter(AdapterFile.open(changed), llama_targets())
            assert pack_adapter(matched.pairs, dtype=torch.float16).max_rank == 4


def test_a_rank_that_differs_from_the_configuration_names_module_and_both_ranks(tmp_path: Path) -> None:
    with pytest.raises(AdapterIncompatible, match=r"model\.layers\.0\.self_attn\.q_proj.*rank 4 .*says 8"):
        AdapterFile.open(write_folder(tmp_path, plain(4)))


def test_a_and_b_of_different_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterIncompatible, match=r"rank 8.*rank 4"):
        AdapterFile.open(write_folder(tmp_path, {A: torch.ones(8, 72), B: torch.ones(72, 4)}))


def test_ranks_are_accepted_up_to_512_and_refused_above(tmp_path: Path) -> None:
    assert AdapterFile.open(write_folder(tmp_path / "512", plain(512), r=512)).pairs
    with pytest.raises(AdapterIncompatible, match="513"):
        AdapterFile.open(write_folder(tmp_path / "513", plain(513), rank_pattern={"q_proj": 513}))


@pytest.mark.parametrize("missing", [A, B])
def test_half_a_pair_is_refused(tmp_path: Path, missing: str) -> None:
    tensors = plain()
    del tensors[missing]
    with pytest.raises(AdapterIncompatible, match="needs exactly lora_A and lora_B"):
        AdapterFile.open(write_folder(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(8,), (8, 72, 1), (8, 72, 1, 1), (0, 72), ()])
def test_a_tensor_that_is_no_matrix_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterIncompatible, match="matrix"):
        AdapterFile.open(write_folder(tmp_path, plain() | {A: torch.ones(shape)}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(AdapterIncompatible, match=str(dtype)):
        AdapterFile.open(write_folder(tmp_path, plain() | {A: torch.ones(8, 72).to(dtype)}))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "LoRA bias"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", "bias"),
        ("model.lm_head.modules_to_save.weight", "modules_to_save"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices"),
        ("model.layers.0.self_attn.q_proj.lora_E", "AdaLoRA"),
        ("model.layers.0.self_attn.q_proj.lora_diag", "KaSA"),
    ],
)
def test_a_tensor_of_a_refused_feature_is_refused_although_the_configuration_hides_it(
    tmp_path: Path, name: str, feature: str
) -> None:
    with pytest.raises(AdapterIncompatible, match=feature):
        AdapterFile.open(write_folder(tmp_path, plain() | {PREFIX + name: torch.ones(2, 2)}))


def test_a_whole_weight_is_listed_as_unknown(tmp_path: Path) -> None:
    name = f"{PREFIX}model.norm.weight"
    assert AdapterFile.open(write_folder(tmp_path, plain() | {name: torch.ones(72)})).unknown == (name,)


def test_two_names_of_one_module_are_refused(tmp_path: Path) -> None:
    twice = plain() | {A.removeprefix(PREFIX): torch.ones(8, 72)}
    with pytest.raises(AdapterIncompatible, match="same matrix"):
        AdapterFile.open(write_folder(tmp_path, twice))


def test_an_overlong_module_name_is_refused(tmp_path: Path) -> None:
    stem = "x" * 5000
    tensors = {f"{stem}.lora_A.weight": torch.ones(8, 4), f"{stem}.lora_B.weight": torch.ones(4, 8)}
    with pytest.raises(AdapterIncompatible, match="5000 characters"):
        AdapterFile.open(write_folder(tmp_path, tensors))


def test_a_target_without_tensors_is_noted(tmp_path: Path) -> None:
    file = AdapterFile.open(write_folder(tmp_path, plain(), target_modules=["q_proj", "k_proj"]))
    assert file.notes == ("adapter_config.json targets 'k_proj', but the file holds no tensors for it",)


def test_weight_tying_with_half_of_the_tie_is_refused(tmp_path: Path) -> None:
    tensors = random_matrices(8, seed=4)
    kept = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    assert AdapterFile.open(write_folder(tmp_path / "both", tensors, ensure_weight_tying=True)).pairs
    with pytest.raises(AdapterIncompatible, match="ensure_weight_tying"):
        AdapterFile.open(write_folder(tmp_path / "half", kept, ensure_weight_tying=True))


EXPERTS = f"{PREFIX}model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({".lora_A.weight": (30, 20), ".lora_B.weight": (32, 30)}, r"\[experts \* 8"),
        ({".lora_A.weight": (32, 20), ".lora_B.weight": (32, 24)}, r"\[experts \* 8"),
        ({".base_layer.lora_A.weight": (32, 20), ".base_layer.lora_B.weight": (32, 32)}, "nested"),
    ],
    ids=["ragged", "A and B disagree", "inner wrapper without an outer one"],
)
def test_stacked_experts_that_do_not_divide_are_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], message: str
) -> None:
    tensors = {EXPERTS + name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(AdapterIncompatible, match=message):
        AdapterFile.open(write_folder(tmp_path, tensors, target_parameters=["experts.down_proj"]))


def test_gate_and_up_rows_that_are_no_equal_halves_are_refused(tmp_path: Path) -> None:
    tensors = {f"{EXPERTS}.lora_A.weight": torch.ones(32, 20), f"{EXPERTS}.lora_B.weight": torch.ones(31, 32)}
    with pytest.raises(AdapterIncompatible, match="31 rows"):
        AdapterFile.open(write_folder(tmp_path, tensors, target_parameters=["gate_up_proj"]))


def test_nested_wrappers_that_no_target_parameter_explains_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"{EXPERTS}.base_layer.lora_A.weight": torch.ones(32, 20),
        f"{EXPERTS}.base_layer.lora_B.weight": torch.ones(40, 32),
    }
    with pytest.raises(AdapterIncompatible, match="target_parameters"):
        AdapterFile.open(write_folder(tmp_path, tensors))
