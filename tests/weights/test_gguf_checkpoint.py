from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import ModelLoadError
from polyaccel.models.config import ModelConfig
from polyaccel.weights.checkpoint import open_checkpoint
from polyaccel.weights.gguf_checkpoint import GGUFCheckpoint
from polyaccel.weights.gguf_names import half_split_rows
from tests.weights.files import FEED_FORWARD, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCABULARY, model_tensors, write_gguf

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


def interleaved(weights: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows as the llama.cpp converter stores Q and K: rotary pairs adjacent."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weights.shape)


@pytest.fixture(scope="module", params=KINDS)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, GGUFCheckpoint]:
    kind = gguf.GGMLQuantizationType[request.param]
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", "qwen2", layers=2, kind=kind)
    return request.param, GGUFCheckpoint(path)


def test_every_storage_type_reads_as_the_gguf_package_says(quantised: tuple[str, GGUFCheckpoint]) -> None:
    name, checkpoint = quantised
    kind = gguf.GGMLQuantizationType[name]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
    stored = model_tensors("qwen2", layers=2)
    expected = gguf.dequantize(gguf.quantize(stored["blk.1.ffn_up.weight"], kind), kind)
    tensor = "model.layers.1.mlp.up_proj.weight"
    assert checkpoint.dtype(tensor) == dtype
    assert checkpoint.shape(tensor) == (FEED_FORWARD, HIDDEN)
    read = checkpoint.read(tensor)
    assert (read.dtype, tuple(read.shape)) == (dtype, (FEED_FORWARD, HIDDEN))
    assert torch.equal(read.float(), torch.from_numpy(expected))
    assert torch.equal(checkpoint.read("model.norm.weight"), torch.from_numpy(stored["output_norm.weight"]))
    assert checkpoint.nbytes(tensor) == gguf.quantize(stored["blk.1.ffn_up.weight"], kind).nbytes


@given(data=st.data())
def test_parts_equal_slices_of_the_whole(quantised: tuple[str, GGUFCheckpoint], data: st.DataObject) -> None:
    _, checkpoint = quantised
    name = data.draw(st.sampled_from(checkpoint.names()), label="name")
    whole, shape = checkpoint.read(name), checkpoint.shape(name)
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2), label="rows"))
    if len(shape) == 1:
        assert torch.equal(checkpoint.read(name, slice(top, bottom)), whole[top:bottom])
        return
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, shape[1])] * 2), label="cols"))
    part = checkpoint.read(name, slice(top, bottom), slice(left, right))
    assert part.dtype == whole.dtype
    assert torch.equal(part, whole[top:bottom, left:right])


@pytest.fixture(scope="module", params=["F32", "F16", "Q4_1", "Q8_0"])
def permuted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GGUFCheckpoint, ...]:
    """The same weights as a llama file (Q and K permuted by the converter) and as a qwen2 file (as they are)."""
    kind = gguf.GGMLQuantizationType[request.param]
    folder = tmp_path_factory.mktemp("permuted")
    plain = model_tensors("llama")
    stored = {**plain, "blk.0.attn_q.weight": interleaved(plain["blk.0.attn_q.weight"], HEADS)}
    stored["blk.0.attn_k.weight"] = interleaved(plain["blk.0.attn_k.weight"], KV_HEADS)
    return (
        GGUFCheckpoint(write_gguf(folder / "llama.gguf", "llama", kind=kind, tensors=stored)),
        GGUFCheckpoint(write_gguf(folder / "qwen2.gguf", "qwen2", kind=kind, tensors=plain)),
    )


@given(data=st.data())
def test_q_and_k_of_llama_come_back_with_halves_apart(
    permuted: tuple[GGUFCheckpoint, ...], data: st.DataObject
) -> None:
    llama, plain = permuted
    for name in plain.names():
        assert torch.equal(llama.read(name), plain.read(name)), name
    name, rows = data.draw(st.sampled_from([(Q, HEADS * HEAD_DIM), (K, KV_HEADS * HEAD_DIM)]), label="name")
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2), label="rows"))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, HIDDEN)] * 2), label="cols"))
    part = slice(top, bottom), slice(left, right)
    assert torch.equal(llama.read(name, *part), plain.read(name, *part))


def test_biases_of_q_and_k_are_permuted_too(tmp_path: Path) -> None:
    plain = model_tensors("qwen2")
    stored = dict(plain)
    for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        for kind in ("weight", "bias"):
            stored[f"blk.0.{part}.{kind}"] = interleaved(plain[f"blk.0.{part}.{kind}"], heads)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", "llama", tensors=stored))
    expected = torch.from_numpy(plain["blk.0.attn_q.bias"])
    assert torch.equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), expected)
    assert torch.equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias", slice(5, 21)), expected[5:21])
    assert checkpoint.hf_config()["attention_bias"] is True


@given(heads=st.integers(1, 4), half=st.integers(1, 8))
def test_half_split_rows_undo_the_converter(heads: int, half: int) -> None:
    rows = np.arange(heads * 2 * half, dtype=np.float32).reshape(-1, 1)
    stored = interleaved(rows, heads)
    assert np.array_equal(stored[half_split_rows(0, len(rows), 2 * half)], rows)


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_stacked_experts_become_one_tensor_each(tmp_path: Path, kind: str) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", experts=3, kind=type_))
    stored = model_tensors("llama", experts=3)
    for ours, theirs in (("w1", "ffn_gate_exps"), ("w2", "ffn_down_exps"), ("w3", "ffn_up_exps")):
        values = stored[f"blk.0.{theirs}.weight"]
        expected = torch.from_numpy(gguf.dequantize(gguf.quantize(values, type_), type_))
        for expert in range(3):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{ours}.weight"
            assert checkpoint.shape(name) == tuple(values.shape[1:])
            assert torch.equal(checkpoint.read(name), expected[expert])
            assert torch.equal(checkpoint.read(name, slice(3, 9), slice(1, 40)), expected[expert, 3:9, 1:40])
    assert "model.layers.0.block_sparse_moe.gate.weight" in checkpoint.names()
    config = ModelConfig.from_hf(checkpoint.hf_config())
    assert (config.family, config.num_experts, config.experts_per_token) == ("mixtral", 3, 2)


@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("llama", "LlamaForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    ],
)
def test_the_configuration_is_that_of_the_metadata(tmp_path: Path, architecture: str, model: str) -> None:
    extra = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
    }
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", architecture, layers=3, extra=extra)) as checkpoint:
        raw = checkpoint.hf_config()
        assert raw["architectures"] == [model]
        config = ModelConfig.from_hf(raw, checkpoint.generation_config())
        assert checkpoint.generation_config() == {}
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (
        HIDDEN,
        3,
        HEADS,
        KV_HEADS,
    )
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (HEAD_DIM, FEED_FORWARD, VOCABULARY)
    assert (config.max_position_embeddings, config.norm_eps, config.rope.theta) == (128, 1e-5, 10000.0)
    assert (config.tie_embeddings, config.bos_token_id, config.eos_token_ids) == (True, 1, (2, 5))
    assert config.sliding_windows == (None,) * 3
    assert config.qkv_bias == (architecture == "qwen2")
    assert config.qk_norm == (architecture == "qwen3")


def test_an_output_matrix_means_that_embeddings_are_not_tied(tmp_path: Path) -> None:
    tensors = model_tensors("llama")
    tensors["output.weight"] = tensors["token_embd.weight"] + 1
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert checkpoint.hf_config()["tie_word_embeddings"] is False
    assert torch.equal(checkpoint.read("lm_head.weight"), torch.from_numpy(tensors["output.weight"]))


def test_rope_factors_reach_the_configuration(tmp_path: Path) -> None:
    tensors = model_tensors("llama")
    factors = np.linspace(1.0, 8.0, HEAD_DIM // 2, dtype=np.float32)
    tensors["rope_freqs.weight"] = factors
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert "rope_freqs.weight" not in checkpoint.names()
    rope = ModelConfig.from_hf(checkpoint.hf_config()).rope
    assert rope.scaling == "factors"
    plain = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(rope.inv_freq(), plain / factors, rtol=1e-6)


def test_linear_and_yarn_scaling_reach_the_configuration(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = ModelConfig.from_hf(GGUFCheckpoint(write_gguf(tmp_path / "l.gguf", extra=extra)).hf_config()).rope
    assert (linear.scaling, linear.factor) == ("linear", 4.0)
    extra = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    yarn = ModelConfig.from_hf(GGUFCheckpoint(write_gguf(tmp_path / "y.gguf", extra=extra)).hf_config()).rope
    assert (yarn.scaling, yarn.factor, yarn.original_max_position_embeddings) == ("yarn", 8.0, 16)
    extra = {"llama.rope.scaling.type": "longrope"}
    with pytest.raises(ModelLoadError, match="'longrope' is not supported"):
        ModelConfig.from_hf(GGUFCheckpoint(write_gguf(tmp_path / "z.gguf", extra=extra)).hf_config())


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.attention.key_length": 16, "llama.attention.value_length": 8}, "different length"),
        ({"llama.attention.key_length": 8}, "expected 4 heads of 8"),
        ({"llama.attention.key_length": 15}, "head dimension 15"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_inconsistent_metadata_are_refused(tmp_path: Path, extra: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", extra=extra))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("blk.0.attn_sinks.weight", (8,), "'blk.0.attn_sinks.weight' belongs to no supported model"),
        ("something", (8,), "'something' belongs to no supported model"),
        ("blk.0.attn_q.3.weight", (8,), "belongs to no supported model"),
        ("blk.01.attn_q.weight", (8,), "belongs to no supported model"),
        ("blk.0.ffn_up_exps.weight", (8, 8), "expected experts x out x in"),
        ("output.weight", (2, 8, 8), "expected 1 or 2"),
    ],
)
def test_a_tensor_of_no_supported_model_is_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], reason: str
) -> None:
    tensors = {**model_tensors("llama"), name: np.zeros(shape, dtype=np.float32)}
    with pytest.raises(ModelLoadError, match=reason):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors))


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="'mamba' is not supported; supported are llama"):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", "mamba", tensors=model_tensors("llama")))


def test_unknown_names_and_bad_slices_are_refused(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf"))
    with pytest.raises(ModelLoadError, match="no tensor 'x'"):
        checkpoint.read("x")
    with pytest.raises(ModelLoadError, match="cannot take"):
        checkpoint.read(Q, slice(0, HEADS * HEAD_DIM + 1))
    with pytest.raises(ModelLoadError, match="too few dimensions"):
        checkpoint.read("model.norm.weight", None, slice(0, 1))
    checkpoint.close()
    with pytest.raises(ModelLoadError, match=r"after close\(\)"):
        checkpoint.read(Q)


@pytest.mark.model
def test_smollm2_reads_as_the_gguf_package_reads_it(smollm2_path: Path) -> None:
    with open_checkpoint(smollm2_path) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.hf_config(), checkpoint.generation_config())
        assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
        assert (config.head_dim, config.intermediate_size, config.vocab_size) == (64, 1536, 49152)
        assert (config.rope.theta, config.norm_eps, config.max_position_embeddings) == (100000.0, 1e-5, 8192)
        assert (config.tie_embeddings, config.eos_token_ids, config.family) == (True, (2,), "llama")
        assert len(checkpoint.names()) == 272
        reader = gguf.GGUFReader(smollm2_path)
        theirs = {tensor.name: tensor for tensor in reader.tensors}
        down = theirs["blk.29.ffn_down.weight"]
        expected = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
        assert torch.equal(checkpoint.read("model.layers.29.mlp.down_proj.weight"), expected)
        embedding = theirs["token_embd.weight"]
        rows = torch.from_numpy(gguf.dequantize(embedding.data[1000:1010], embedding.tensor_type))
        assert torch.equal(checkpoint.read("model.embed_tokens.weight", slice(1000, 1010)), rows)
        assert checkpoint.fingerprint() == GGUFCheckpoint(smollm2_path).fingerprint()


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_tensors_equal_those_that_transformers_reads(smollm2_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    theirs = model.state_dict()
    with open_checkpoint(smollm2_path) as checkpoint:
        assert set(theirs) - set(checkpoint.names()) == {"lm_head.weight"}
        different = [name for name in checkpoint.names() if not torch.equal(checkpoint.read(name), theirs[name])]
    assert different == []
