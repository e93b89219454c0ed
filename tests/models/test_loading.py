"""Reading a checkpoint: what is refused, what is read by whom, and that a weight can be written anew."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyaccel.backend.communicator import SingleRank
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.errors import ConfigurationError, ModelLoadError, OperatorError
from polyaccel.backend.weight import Weight
from polyaccel.models import loading
from polyaccel.models.model import Model
from polyaccel.weights.checkpoint import Checkpoint, open_checkpoint
from tests.models.families import FAMILIES, build, open_saved, random_reference, reference_logits, save
from tests.models.scenario import assert_close, drive, random_tokens
from tests.support.driver import StepDriver
from tests.support.thread_comm import ThreadCommunicator, run_ranks

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


def _edited(family: str, folder: Path, **changes: torch.Tensor | None) -> Checkpoint:
    """The family's checkpoint with tensors added or replaced, or removed where None; names with / for dots."""
    save(random_reference(family), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("/", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


class CountingCheckpoint(Checkpoint):
    """Passes everything on and counts the elements read of each tensor."""

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        self.elements: dict[str, int] = {}

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        part = self._inner.read(name, rows=rows, cols=cols)
        self.elements[name] = self.elements.get(name, 0) + part.numel()
        return part

    def names(self) -> tuple[str, ...]:
        return self._inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(name)

    def nbytes(self, name: str) -> int:
        return self._inner.nbytes(name)

    def hf_config(self) -> dict[str, object]:
        return self._inner.hf_config()

    def generation_config(self) -> dict[str, object]:
        return self._inner.generation_config()

    def fingerprint(self) -> str:
        return self._inner.fingerprint()

    def close(self) -> None:
        self._inner.close()


def _values(weights: dict[str, Weight]) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    for site, weight in weights.items():
        assert isinstance(weight, TensorWeight)
        values[site] = weight.tensor.clone()
        if weight.bias is not None:
            values[f"{site}.bias"] = weight.bias.clone()
    return values


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_all_missing_tensors_are_named_at_once_and_nothing_is_read(tmp_path: Path) -> None:
    up = "model.layers.2.mlp.up_proj.weight"
    counting = CountingCheckpoint(_edited("llama", tmp_path, **{NORM: None, up: None, HEAD: None}))
    with pytest.raises(ModelLoadError, match="3 tensors are missing") as caught:
        build(counting)
    assert all(name in str(caught.value) for name in (NORM, up, HEAD))
    assert counting.elements == {}


def test_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ModelLoadError, match=f"1 tensors have no place in this model: {name}"):
        build(_edited("llama", tmp_path, **{name: torch.zeros(72)}))


def test_shapes_and_dtypes_are_compared_with_the_configuration_before_anything_is_read(tmp_path: Path) -> None:
    changes = {NORM: torch.ones(71), EMBEDDING: torch.ones(50, 72, dtype=torch.int32)}
    counting = CountingCheckpoint(_edited("llama", tmp_path, **changes))
    with pytest.raises(ModelLoadError, match="2 tensors do not fit") as caught:
        build(counting)
    assert f"{NORM} has shape [71], the configuration wants [72]" in str(caught.value)
    assert f"{EMBEDDING} has dtype torch.int32" in str(caught.value)
    assert counting.elements == {}


def test_a_configuration_with_another_width_is_refused(tmp_path: Path) -> None:
    save(random_reference("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 200}))
    with pytest.raises(ModelLoadError, match="9 tensors do not fit"):
        build(open_checkpoint(tmp_path))


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_buffers_that_old_exports_saved_are_ignored(tmp_path: Path, family: str) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plain = build(_edited(family, tmp_path / "plain"))
    old = build(_edited(family, tmp_path / "old", **{name: torch.ones(4)}))
    assert _equal(_values(plain.weights()), _values(old.weights()))


def test_a_second_copy_of_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    plain = build(_edited("llama3", tmp_path / "plain"))
    doubled = build(_edited("llama3", tmp_path / "doubled", **{HEAD: torch.full((50, 96), torch.nan)}))
    assert _equal(_values(plain.weights()), _values(doubled.weights()))


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_rank_reads_its_own_part_only(tmp_path: Path, family: str, world: int) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    total: dict[str, int] = {}
    for rank in range(world):
        counting = CountingCheckpoint(checkpoint)
        build(counting, rank=rank, world_size=world)
        for name, elements in counting.elements.items():
            total[name] = total.get(name, 0) + elements
    heads = checkpoint.hf_config()["num_key_value_heads"]
    assert isinstance(heads, int)
    for name in checkpoint.names():
        size = torch.Size(checkpoint.shape(name)).numel()
        if "norm" in name or ".gate." in name:
            assert total[name] == world * size, name
        elif world > heads and (".k_proj." in name or ".v_proj." in name):
            assert total[name] == size * world // heads if world % heads == 0 else total[name] > size, name
        else:
            assert total[name] == size, name


@pytest.mark.parametrize("family", FAMILIES)
def test_progress_counts_the_bytes_of_this_rank_up_to_the_total(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    size = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    for world in (1, 2):
        model = build(checkpoint, rank=0, world_size=world, load=False)
        seen: list[tuple[int, int]] = []
        model.load(checkpoint, lambda done, total, seen=seen: seen.append((done, total)))  # type: ignore[misc]
        assert len({total for _, total in seen}) == 1
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert seen[-1][0] == seen[-1][1]
        assert seen[-1][1] == size if world == 1 else size // 2 <= seen[-1][1] < size


@pytest.mark.parametrize("chunk", [1, 37, 1000])
def test_the_size_of_the_pieces_read_changes_no_bit(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in ("llama3", "mixtral"):
        _, checkpoint = open_saved(family, tmp_path / family)
        whole = _values(build(checkpoint, rank=1, world_size=3).weights())
        with monkeypatch.context() as patch:
            patch.setattr(loading, "CHUNK_ELEMENTS", chunk)
            assert _equal(_values(build(checkpoint, rank=1, world_size=3).weights()), whole)


def test_a_half_precision_checkpoint_is_widened_exactly(tmp_path: Path) -> None:
    reference = random_reference("llama")
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model = build(open_checkpoint(save(copy.deepcopy(reference).bfloat16(), tmp_path)))
    tokens = random_tokens(model.vocabulary)
    logits = drive(StepDriver(model, SingleRank()), tokens)
    for number, ids in tokens.items():
        assert_close(logits[number], reference_logits(reference, ids), f"sequence {number}")


def test_experts_stacked_in_one_tensor_are_read_like_separate_ones(tmp_path: Path) -> None:
    reference, checkpoint = open_saved("mixtral", tmp_path / "separate")
    save(reference, tmp_path / "stacked")
    tensors = load_file(tmp_path / "stacked" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    kept |= {name: tensor for name, tensor in reference.state_dict().items() if ".mlp." in name}
    save_file(kept, tmp_path / "stacked" / "model.safetensors", metadata={"format": "pt"})
    stacked = open_checkpoint(tmp_path / "stacked")
    assert "model.layers.0.mlp.experts.gate_up_proj" in stacked.names()
    for world in (1, 2, 3, 4):
        for rank in range(world):
            separate = build(checkpoint, rank=rank, world_size=world).weights()
            assert _equal(_values(separate), _values(build(stacked, rank=rank, world_size=world).weights()))


# --- writing anew ----------------------------------------------------------------------------------------------------


def _spoil(model: Model, site: str) -> None:
    """What a merge does: open, write, seal."""
    weight = model.weights()[site]
    source = model.weights()[weight.spec.tied_to or site]
    assert isinstance(source, TensorWeight)
    source.reopen()
    source.tensor.add_(1.0)
    if source.bias is not None:
        source.bias.add_(1.0)
    source.seal()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_site_has_the_same_bits_as_before(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    for rank in (0, 2):
        model = build(checkpoint, rank=rank, world_size=3)
        before = _values(model.weights())
        for site in model.weights():
            _spoil(model, site)
            assert not _equal(_values(model.weights()), before)
            model.reload(checkpoint, site)
            assert _equal(_values(model.weights()), before), site


def test_a_reloaded_site_is_sealed_again(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    model = build(checkpoint)
    model.reload(checkpoint, "layers.0.o")
    for weight in model.weights().values():
        with pytest.raises(OperatorError, match="sealed"):
            weight.write(0, torch.zeros(1, 1))


def test_a_model_can_be_loaded_twice(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama3", tmp_path)
    model = build(checkpoint)
    before = _values(model.weights())
    _spoil(model, "embedding")
    model.load(checkpoint)
    assert _equal(_values(model.weights()), before)


def test_reloading_an_unknown_site_names_those_that_exist(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    with pytest.raises(ConfigurationError, match=r"'layers.9.o'; the model has embedding, layers.0.qkv"):
        build(checkpoint).reload(checkpoint, "layers.9.o")


def test_reloading_from_another_models_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path / "right")
    _, other = open_saved("mistral", tmp_path / "wrong")
    model = build(checkpoint)
    before = _values(model.weights())
    with pytest.raises(ModelLoadError, match="1 tensors do not fit"):
        model.reload(other, "layers.0.o")
    assert _equal(_values(model.weights()), before)


def test_ranks_load_at_the_same_time_from_one_checkpoint(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path)

    def rank(comm: ThreadCommunicator) -> dict[str, torch.Tensor]:
        return _values(build(checkpoint, rank=comm.rank, world_size=3).weights())

    for number, values in enumerate(run_ranks(3, rank)):
        assert _equal(values, _values(build(checkpoint, rank=number, world_size=3).weights()))
