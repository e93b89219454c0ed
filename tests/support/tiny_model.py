"""A tiny Llama with a tokenizer and a chat template, its PEFT adapters, and the engines that tests start on it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from polyaccel import LLM
from polyaccel.backend import TableBackend
from polyaccel.backend.null.backend import NullBackend

# As SmolLM2: 9 query and 3 KV heads. The model's vocabulary is larger than the tokenizer's.
HEADS, KV_HEADS, HIDDEN, LAYERS, VOCABULARY, MAX_POSITIONS = 9, 3, 72, 2, 272, 512
MERGES = ("t h", "th e", "Ġ the", "a n", "an d", "Ġ and", "i n", "in g")
BOS, END, STOP = "<|begin|>", "<|im_end|>", "<|stop|>"
BOS_ID, END_ID, STOP_ID = 264, 265, 266
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ '<|begin|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}{{ suffix | default('') }}"
)
PROCESS_BACKEND = "cpu"
BLOCK_BYTES = LAYERS * 2 * 16 * KV_HEADS * (HIDDEN // HEADS) * 4
"""Bytes of one KV block of 16 tokens in float32."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "plain": {"r": 8, "lora_alpha": 16, "target_modules": list(LINEARS)},
        "rslora": {"r": 7, "lora_alpha": 8, "target_modules": list(LINEARS), "use_rslora": True},
        "patterns": {
            "r": 16,
            "lora_alpha": 8,
            "target_modules": list(LINEARS),
            "rank_pattern": {"k_proj": 3, "o_proj": 24},
            "alpha_pattern": {"v_proj": 32, "layers.0.mlp.up_proj": 1},
        },
        "subset": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        "ends": {"r": 5, "lora_alpha": 16, "target_modules": ["embed_tokens", "lm_head"]},
        "all": {"r": 33, "lora_alpha": 16, "target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
    }
)


@dataclass(frozen=True)
class TinyAdapter:
    """A saved adapter, the transformers model with it merged in, and its largest rank."""

    folder: Path
    merged: Any
    rank: int


@dataclass
class TinyModel:
    """The folder with everything, and what transformers answers for it. Adapters are made when first asked for."""

    folder: Path
    reference: Any
    work: Path
    _adapters: dict[str, TinyAdapter] = field(default_factory=dict)
    _mixed: dict[tuple[tuple[str, float], ...], Any] = field(default_factory=dict)
    _greedy: dict[tuple[object, ...], list[int]] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """transformers' own tokenizer of the folder."""
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def adapter(self, name: str) -> TinyAdapter:
        if name not in self._adapters:
            seed = list(ADAPTERS).index(name)
            self._adapters[name] = make_adapter(self.reference, ADAPTERS[name], self.work / name, seed)
        return self._adapters[name]

    def model(self, mix: Mapping[str, float] | str | None = None) -> Any:
        """The reference with the weighted sum of the adapters' merged deltas."""
        weights = {mix: 1.0} if isinstance(mix, str) else dict(mix or {})
        key = tuple(sorted(weights.items()))
        if not key:
            return self.reference
        if key not in self._mixed:
            self._mixed[key] = mixed(self.reference, [(self.adapter(n).merged, w) for n, w in key])
        return self._mixed[key]

    def greedy(self, prompt: Sequence[int], count: int, mix: Mapping[str, float] | str | None = None) -> list[int]:
        """What transformers answers, token by token without a cache."""
        key = (tuple(prompt), count, str(mix))
        if key not in self._greedy:
            ids = list(prompt)
            model = self.model(mix)
            with torch.no_grad():
                for _ in range(count):
                    ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            self._greedy[key] = ids[len(prompt) :]
        return self._greedy[key]

    def logprobs(self, prompt: Sequence[int], output: Sequence[int], mix: str | None = None) -> torch.Tensor:
        """``[output, vocabulary]``: log-probabilities at the place of each output token."""
        ids = [*prompt, *output]
        with torch.no_grad():
            logits = self.model(mix)(torch.tensor([ids]), use_cache=False).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), -1)

    def open(self, **options: Any) -> LLM:
        """An engine on composites in this process, small and in float32 unless told otherwise."""
        return LLM(self.folder, **settings(**options))

    def open_workers(self, ranks: int = 1, **options: Any) -> LLM:
        """An engine whose ranks are processes."""
        several: dict[str, Any] = {
            "backend": PROCESS_BACKEND,
            "executor": "process",
            "tensor_parallel_size": ranks,
            "threads": 1,
            "timeout": 60.0,
        }
        return self.open(**(several | options))


def settings(**options: Any) -> dict[str, Any]:
    """Options of a small engine on composites, with these changes."""
    small: dict[str, Any] = {
        "backend": TableBackend("cpu", {}),
        "policy": "allow",
        "dtype": "float32",
        "max_num_seqs": 16,
        "kv_cache_bytes": 256 * BLOCK_BYTES,
    }
    return small | options


def make_tiny(folder: Path) -> TinyModel:
    """Write the model; its weights are random, with a fixed seed."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=100,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * values if "norm" in name else values * parameter.shape[-1] ** -0.5)
    home = folder / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(home)
        write_tokenizer(home)
    tokens = transformers.AutoTokenizer.from_pretrained(home)
    assert tokens.convert_tokens_to_ids([BOS, END, STOP]) == [BOS_ID, END_ID, STOP_ID]
    (home / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_ID, STOP_ID]}))
    return TinyModel(folder=home, reference=model, work=folder)


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary: 256 bytes (id = byte order of the alphabet), a few merges, three special tokens."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([BOS, END, STOP])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=BOS)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_adapter(
    reference: Any, config: Mapping[str, object], folder: Path, seed: int, scale: float = 0.5
) -> TinyAdapter:
    """A random adapter, saved and merged by PEFT; ``scale`` makes it matter."""
    import peft

    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(reference), peft.LoraConfig(**dict(config)))
        ranks = []
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 * scale)
                ranks.append(min(parameter.shape))
        wrapped.save_pretrained(folder)
        merged = wrapped.merge_and_unload().eval()
    return TinyAdapter(folder=folder, merged=merged, rank=max(ranks))


def mixed(reference: Any, adapters: Sequence[tuple[Any, float]]) -> Any:
    """The reference plus the weighted deltas of merged models."""
    result = copy.deepcopy(reference)
    base = reference.state_dict()
    total = {name: value.clone() for name, value in base.items()}
    for merged, weight in adapters:
        for name, value in merged.state_dict().items():
            total[name] += weight * (value - base[name])
    result.load_state_dict(total)
    return result


def random_prompts(count: int, *, seed: int = 1, low: int = 3, high: int = 40) -> list[list[int]]:
    """Prompts of ids below the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def scripted(outputs: Mapping[int, Sequence[int]], prompt_tokens: int, **options: Any) -> NullBackend:
    """A backend that answers a request of seed s and ``prompt_tokens`` prompt tokens with ``outputs[s]``, then END."""

    def script(seeds: np.ndarray, positions: np.ndarray, vocabulary: int) -> np.ndarray:
        ids = np.full(len(seeds), END_ID, dtype=np.int64)
        for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
            output = outputs.get(seed, ())
            if 0 <= position - prompt_tokens < len(output):
                ids[row] = output[position - prompt_tokens]
        return ids

    return NullBackend(script=script, **options)
