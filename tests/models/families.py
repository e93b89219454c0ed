"""A tiny random transformers model of every family, saved as a checkpoint, and ours built from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import transformers

from polyaccel.backend.backend import Backend
from polyaccel.backend.device import Device, TorchDevice
from polyaccel.backend.table import TableBackend
from polyaccel.models.config import ModelConfig
from polyaccel.models.model import Model, ModelOptions
from polyaccel.models.registry import build_model
from polyaccel.weights.checkpoint import Checkpoint, open_checkpoint

SEED = 20
LAYERS = 3
MAX_POSITIONS = 64

_COMMON: Mapping[str, Any] = MappingProxyType({"num_hidden_layers": LAYERS, "max_position_embeddings": MAX_POSITIONS})


def _llama(**changes: object) -> transformers.PreTrainedModel:
    options: dict[str, Any] = {
        **_COMMON,
        "vocab_size": 50,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(options | changes)))


def llama() -> transformers.PreTrainedModel:
    """9 query and 3 KV heads, as SmolLM2; a vocabulary that no world size above 2 divides."""
    return _llama()


def llama3() -> transformers.PreTrainedModel:
    """Scaled rotary frequencies whose original context is so short that all three bands occur, tied, all biases."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return _llama(
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=scaling,
    )


def mistral() -> transformers.PreTrainedModel:
    """A sliding window shorter than the sequences, heads wider than hidden / heads."""
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **_COMMON,
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=5,
        )
    )


def qwen2() -> transformers.PreTrainedModel:
    """Biases of q, k, v; one KV head; a window on some layers; a vocabulary that leaves the fourth rank nothing."""
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **_COMMON,
            vocab_size=9,
            hidden_size=40,
            intermediate_size=48,
            num_attention_heads=5,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            tie_word_embeddings=True,
        )
    )


def qwen3() -> transformers.PreTrainedModel:
    """Norms of each head of q and k."""
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_COMMON,
            vocab_size=50,
            hidden_size=48,
            intermediate_size=64,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=16,
        )
    )


def mixtral() -> transformers.PreTrainedModel:
    """Five experts, two a token, of an intermediate size that four ranks cannot cut evenly."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **_COMMON,
            vocab_size=53,
            hidden_size=32,
            intermediate_size=50,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=5,
            num_experts_per_tok=2,
        )
    )


FAMILIES: Mapping[str, Callable[[], transformers.PreTrainedModel]] = MappingProxyType(
    {"llama": llama, "llama3": llama3, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "mixtral": mixtral}
)


def random_reference(family: str) -> transformers.PreTrainedModel:
    """The transformers model with every parameter random: norms around 1, biases (which start as zero) too."""
    model = FAMILIES[family]()
    model.train(False)
    if family == "mixtral":
        # The default wants widths in multiples of 16 bytes.
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * values)
            else:
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """A folder with config.json and safetensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def reference_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """``[tokens, vocabulary]``: one uncached pass over the whole sequence."""
    return cast(torch.Tensor, model(torch.tensor([tokens]), use_cache=False).logits[0])


class CompositeBackend(TableBackend):
    """Plain torch on the CPU; ``equal`` asks for equal shards on all ranks."""

    def __init__(self, *, equal: bool = False) -> None:
        super().__init__("cpu", {}, name="composites")
        self.needs_equal_shards = equal


def build(
    checkpoint: Checkpoint,
    *,
    rank: int = 0,
    world_size: int = 1,
    rank_rows: int = 0,
    backend: Backend | None = None,
    devices: tuple[Device, ...] | None = None,
    load: bool = True,
) -> Model:
    """One rank's part of the checkpoint's model, loaded."""
    config = ModelConfig.from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    model = build_model(
        ModelOptions(
            config=config,
            backend=backend or CompositeBackend(),
            devices=devices or (TorchDevice("cpu"),) * config.num_layers,
            rank=rank,
            world_size=world_size,
            dtype=torch.float32,
            rank_rows=rank_rows,
            max_positions=MAX_POSITIONS,
        )
    )
    if load:
        model.load(checkpoint)
    return model


def open_saved(family: str, folder: Path) -> tuple[transformers.PreTrainedModel, Checkpoint]:
    """The reference model and its checkpoint."""
    model = random_reference(family)
    return model, open_checkpoint(save(model, folder))
