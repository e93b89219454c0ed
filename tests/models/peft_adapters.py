"""PEFT adapters on the tiny models: their folders, and the reference models that they are merged into."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import peft
import torch
import transformers

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.lora.adapter_file import AdapterFile
from polyaccel.lora.match import match_adapter
from polyaccel.lora.pack import pack_adapter
from tests.support.driver import StepDriver

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
# Two adapters a family: one on everything, one on a part; ranks that are no power of two, above a KV head's width.
CONFIGS: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType(
    {
        "llama": (
            {"r": 7, "lora_alpha": 16, "target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
            {"r": 33, "lora_alpha": 8, "target_modules": ["v_proj", "o_proj", "down_proj"], "use_rslora": True},
        ),
        "llama3": (
            {"r": 4, "lora_alpha": 16, "target_modules": list(LINEARS)},
            {"r": 3, "lora_alpha": 8, "target_modules": list(LINEARS), "layers_to_transform": [1]},
        ),
        "mistral": (
            {"r": 16, "lora_alpha": 8, "target_modules": list(LINEARS), "rank_pattern": {"k_proj": 3, "o_proj": 24}},
            {"r": 1, "lora_alpha": 8, "target_modules": ["q_proj"]},
        ),
        "qwen2": (
            {"r": 5, "lora_alpha": 16, "target_modules": [*LINEARS]},
            {"r": 8, "lora_alpha": 16, "target_modules": ["up_proj"]},
        ),
        "qwen3": (
            {"r": 8, "lora_alpha": 32, "target_modules": [*LINEARS, "embed_tokens"]},
            {"r": 2, "lora_alpha": 8, "target_modules": ["k_proj", "lm_head"]},
        ),
        "mixtral": (
            {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "target_parameters": list(EXPERTS)},
            {"r": 4, "lora_alpha": 16, "target_modules": [], "target_parameters": ["experts.down_proj", "gate.weight"]},
        ),
    }
)


@dataclass
class Adapter:
    """A saved adapter and the transformers model it is merged into."""

    folder: Path
    merged: transformers.PreTrainedModel
    rank: int


def make(reference: transformers.PreTrainedModel, family: str, folder: Path) -> list[Adapter]:
    """The family's adapters, random, saved by PEFT and merged by PEFT."""
    return [
        _make(reference, dict(config), folder / f"adapter{seed}", seed) for seed, config in enumerate(CONFIGS[family])
    ]


def _make(reference: transformers.PreTrainedModel, config: dict[str, Any], folder: Path, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(reference), peft.LoraConfig(**config))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 * 0.5)
        wrapped.save_pretrained(str(folder))
        merged = cast(transformers.PreTrainedModel, wrapped.merge_and_unload())
    largest = max(pair.numbers.true_rank for pair in AdapterFile.open(folder).pairs.values())
    return Adapter(folder=folder, merged=merged, rank=largest)


def mixed(
    reference: transformers.PreTrainedModel, adapters: Sequence[Adapter], weights: Sequence[float]
) -> transformers.PreTrainedModel:
    """The reference plus the weighted sum of the adapters' merged deltas."""
    result = copy.deepcopy(reference)
    base = reference.state_dict()
    total = {name: value.clone() for name, value in base.items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, value in adapter.merged.state_dict().items():
            total[name] += weight * (value - base[name])
    result.load_state_dict(total)
    return result


def write_all(driver: StepDriver, adapters: Sequence[Adapter]) -> None:
    """Adapter i into slot i of every device's store."""
    first = 0
    for slot, adapter in enumerate(adapters):
        matched = match_adapter(AdapterFile.open(adapter.folder), driver.model.targets())
        driver.plan.extend(matched.max_rank)
        where = SlotRange(slot=slot, first_rank_row=first, rank_rows=adapter.rank)
        for index, store in driver.stores().items():
            here = {target.module for target in driver.model.targets(index)}
            pairs = [pair for pair in matched.pairs if pair[0].module in here]
            store.write(where, pack_adapter(pairs, dtype=driver.model.options.dtype))
        first += adapter.rank
