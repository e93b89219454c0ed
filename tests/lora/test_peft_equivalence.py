"""PEFT itself is the reference: every module's delta, from folders that PEFT wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.adapter_file import AdapterFile
from polyaccel.lora.match import match_adapter
from polyaccel.lora.pack import pack_adapter
from polyaccel.lora.target import AdapterTarget
from polyaccel.parallel.cut import Rows, even_cut
from tests.lora.folders import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, VOCABULARY, llama_targets

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, object]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": LINEARS},
    "rank 1": {"r": 1, "lora_alpha": 8, "target_modules": LINEARS},
    "rank 33": {"r": 33, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank above the width": {"r": 128, "lora_alpha": 32, "target_modules": ["k_proj", "down_proj"]},
    "rslora": {"r": 24, "lora_alpha": 16, "use_rslora": True, "target_modules": LINEARS},
    "regex target": {"r": 4, "lora_alpha": 16, "target_modules": r".*self_attn\.(q|v)_proj"},
    "all-linear": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "excluded": {"r": 4, "lora_alpha": 16, "target_modules": LINEARS, "exclude_modules": ["v_proj"]},
    "one layer": {"r": 4, "lora_alpha": 16, "target_modules": LINEARS, "layers_to_transform": [1]},
    "embedding": {"r": 4, "lora_alpha": 16, "target_modules": ["embed_tokens", "q_proj"]},
    "lm_head": {"r": 4, "lora_alpha": 16, "target_modules": ["lm_head"]},
    "embedding and lm_head": {"r": 7, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head"]},
    "mica": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "rank_pattern": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": LINEARS,
        "rank_pattern": {"k_proj": 3, "layers.1.self_attn.q_proj": 16, r".*\.0\.mlp\..*": 5, "down_proj": 1},
    },
    "alpha_pattern": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": LINEARS,
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, "o_proj": 64, r"layers\.\d+\.mlp\.(gate|up)_proj": 5},
    },
    "both patterns and rslora": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": [*LINEARS, "embed_tokens"],
        "rank_pattern": {"q_proj": 24, "embed_tokens": 5, "self.attn.k_proj": 2},
        "alpha_pattern": {"q_proj": 7, "embed.tokens": 11},
    },
}


def tiny_llama(tied: bool = False) -> object:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            tie_word_embeddings=tied,
        )
    )


def save_randomised(model: object, config: object, folder: Path, dtype: torch.dtype = torch.float32) -> object:
    """A PEFT model whose matrices are all random and kept in ``dtype``, saved to the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        wrapped.save_pretrained(folder)
    return wrapped


def reference_deltas(wrapped: object) -> dict[str, torch.Tensor]:
    """``[out, in]`` deltas by module; an embedding's is turned round to that orientation too."""
    deltas = {}
    for name, module in wrapped.get_base_model().named_modules():  # type: ignore[attr-defined]
        if isinstance(module, peft.tuners.lora.Embedding):
            deltas[name] = module.get_delta_weight("default").detach().T
        elif isinstance(module, peft.tuners.lora.Linear):
            deltas[name] = module.get_delta_weight("default").detach()
    return deltas


def check(folder: Path, targets: list[AdapterTarget], reference: dict[str, torch.Tensor]) -> None:
    file = AdapterFile.open(folder)
    matched = match_adapter(file, targets)
    assert sorted(target.module for target, _ in matched.pairs) == sorted(reference)
    packed = pack_adapter(matched.pairs, dtype=torch.float32)
    for (target, pair), entry in zip(matched.pairs, packed.entries, strict=True):
        expected = reference[target.module]
        unpacked = pair.numbers.scale * (pair.b.float() @ pair.a.float())
        torch.testing.assert_close(unpacked, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        folded = packed.b(entry) @ packed.a(entry)
        torch.testing.assert_close(folded, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_modules_delta_equals_pefts(tmp_path: Path, kind: str) -> None:
    wrapped = save_randomised(tiny_llama(), peft.LoraConfig(**KINDS[kind]), tmp_path)
    reference = reference_deltas(wrapped)
    assert reference
    check(tmp_path, llama_targets(), reference)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_equal_the_float32_product_of_their_matrices(tmp_path: Path, dtype: torch.dtype) -> None:
    config = peft.LoraConfig(r=24, lora_alpha=16, target_modules=LINEARS)
    wrapped = save_randomised(tiny_llama(), config, tmp_path, dtype)
    for parameter in wrapped.parameters():  # type: ignore[attr-defined]
        parameter.data = parameter.data.float()
    file = AdapterFile.open(tmp_path)
    assert {pair.a.dtype for pair in file.pairs.values()} == {dtype}
    check(tmp_path, llama_targets(), reference_deltas(wrapped))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_unwrapped_model_is_matched_through_the_missing_prefix(tmp_path: Path) -> None:
    wrapped = save_randomised(tiny_llama().model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)  # type: ignore[attr-defined]
    names = set(AdapterFile.open(tmp_path).pairs)
    assert names == {f"layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    reference = {f"model.{name}": delta for name, delta in reference_deltas(wrapped).items()}
    check(tmp_path, llama_targets(), reference)


@pytest.mark.filterwarnings("ignore")
def test_the_base_weights_that_peft_saves_beside_an_embedding_are_noted_and_not_read(tmp_path: Path) -> None:
    save_randomised(tiny_llama(), peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), tmp_path)
    file = AdapterFile.open(tmp_path)
    assert sorted(module for module, _ in file.base_copies) == ["lm_head", "model.embed_tokens"]
    assert not file.unknown
    notes = match_adapter(file, llama_targets()).notes
    assert len([note for note in notes if "base weight" in note]) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_tied_adapter_of_embedding_and_lm_head_is_read_from_both(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"], ensure_weight_tying=True)
    wrapped = save_randomised(tiny_llama(tied=True), config, tmp_path)
    check(tmp_path, llama_targets(), reference_deltas(wrapped))


EXPERTS, MOE_HIDDEN, MOE_INTERMEDIATE = 4, 32, 20


def tiny_mixtral() -> object:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=MOE_HIDDEN,
            intermediate_size=MOE_INTERMEDIATE,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
        )
    )


def mixtral_targets(world: int = 1, rank: int = 0, experts: int = EXPERTS) -> list[AdapterTarget]:
    """The experts of a small Mixtral under the names of its checkpoint, cut by tensor."""
    inter = even_cut(MOE_INTERMEDIATE, world, rank)
    hidden = Rows.whole(MOE_HIDDEN)
    leaves = (("w1", 0), ("w3", 1), ("w2", 0))
    return [
        AdapterTarget(
            module=f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}",
            site=f"layers.{layer}.experts.{'down' if leaf == 'w2' else 'gate_up'}",
            slice=index,
            expert=expert,
            in_features=MOE_INTERMEDIATE if leaf == "w2" else MOE_HIDDEN,
            out_features=MOE_HIDDEN if leaf == "w2" else MOE_INTERMEDIATE,
            out_rows=hidden if leaf == "w2" else inter,
            in_cols=inter if leaf == "w2" else hidden,
            layer=layer,
        )
        for layer in (0, 1)
        for expert in range(experts)
        for leaf, index in leaves
    ]


def expert_reference(wrapped: object) -> dict[str, torch.Tensor]:
    """``[out, in]`` deltas of every expert under its checkpoint name, cut from PEFT's own stacked delta."""
    found = {}
    for name, module in wrapped.get_base_model().named_modules():  # type: ignore[attr-defined]
        if not isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            continue
        stacked = module.get_delta_weight("default").detach()
        parent = name.replace(".base_layer", "").replace(".mlp.", ".block_sparse_moe.")
        for expert in range(EXPERTS):
            if module.parameter_name == "down_proj":
                found[f"{parent}.{expert}.w2"] = stacked[expert]
            else:
                found[f"{parent}.{expert}.w1"] = stacked[expert][:MOE_INTERMEDIATE]
                found[f"{parent}.{expert}.w3"] = stacked[expert][MOE_INTERMEDIATE:]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
        {"target_modules": ["w1", "w2", "w3"]},
        {
            "target_modules": [],
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {r".*layers\.1\.mlp\.experts\.gate_up_proj": 5},
            "alpha_pattern": {"experts.down_proj": 3},
        },
    ],
    ids=["both", "gate_up alone", "down alone with rslora", "names of the checkpoint", "patterns"],
)
def test_stacked_experts_are_cut_into_the_deltas_that_peft_applies(tmp_path: Path, config: dict[str, object]) -> None:
    wrapped = save_randomised(tiny_mixtral(), peft.LoraConfig(r=3, lora_alpha=8, **config), tmp_path)
    reference = expert_reference(wrapped)
    assert reference
    check(tmp_path, mixtral_targets(), reference)


@pytest.mark.filterwarnings("ignore")
def test_stacked_experts_cut_by_tensor_join_to_the_whole(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["w1", "w2", "w3"])
    reference = expert_reference(save_randomised(tiny_mixtral(), config, tmp_path))
    file = AdapterFile.open(tmp_path)
    for world in (2, 3, 4):
        packs = []
        for rank in range(world):
            matched = match_adapter(file, mixtral_targets(world, rank))
            packs.append(pack_adapter(matched.pairs, dtype=torch.float32))
        for index, target in enumerate(mixtral_targets()):
            parts = [packed.b(packed.entries[index]) @ packed.a(packed.entries[index]) for packed in packs]
            whole = torch.cat(parts, 1 if target.module.endswith("w2") else 0)
            torch.testing.assert_close(whole, reference[target.module], rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_router_is_read_as_the_parameter_that_peft_targets(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=[],
        target_parameters=["mlp.gate.weight"],
        rank_pattern={"layers.1.mlp.gate.weight": 3},
        alpha_pattern={r"gate\.weight": 5},
    )
    wrapped = save_randomised(tiny_mixtral(), config, tmp_path)
    routers = [
        AdapterTarget(
            module=f"model.layers.{layer}.block_sparse_moe.gate",
            site=f"layers.{layer}.router",
            slice=0,
            in_features=MOE_HIDDEN,
            out_features=EXPERTS,
            out_rows=Rows.whole(EXPERTS),
            in_cols=Rows.whole(MOE_HIDDEN),
            layer=layer,
        )
        for layer in (0, 1)
    ]
    layers = wrapped.get_base_model().model.layers  # type: ignore[attr-defined]
    reference = {
        target.module: layers[layer].mlp.gate.get_delta_weight("default").detach()
        for layer, target in enumerate(routers)
    }
    assert [pair.numbers.scale for pair in AdapterFile.open(tmp_path).pairs.values()] == [5 / 2, 5 / 3]
    check(tmp_path, routers, reference)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_for_another_number_of_experts_is_refused_with_both_numbers(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["experts.down_proj"])
    save_randomised(tiny_mixtral(), config, tmp_path)
    file = AdapterFile.open(tmp_path)
    with pytest.raises(AdapterIncompatible, match=r"for 4 experts but the model has 8"):
        match_adapter(file, mixtral_targets(experts=8))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "LoRA bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_are_refused_in_the_folders_that_peft_itself_writes(
    tmp_path: Path, config: dict[str, object], feature: str
) -> None:
    save_randomised(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], **config), tmp_path)
    with pytest.raises(AdapterIncompatible, match=feature):
        AdapterFile.open(tmp_path)
