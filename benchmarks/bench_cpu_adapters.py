"""Eight requests on eight different adapters in one batch, against eight base requests, on the CPU.

    python benchmarks/bench_cpu_adapters.py [--rank 8] [--batch 8] [--new-tokens 128]

The adapters are random, of the given rank, on all seven linear layers of SmolLM2 (each 9.8 MB in float32 at rank 8, so
eight of them add 14.5 % to the bytes of a step). Base and adapted runs alternate; the median of each. In the same run
every adapter's first tokens are checked against the same adapter merged into the base weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import add_common_options, save, smollm2

import polyaccel

HIDDEN, KV, FFN, LAYERS = 576, 192, 1536, 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def write_adapter(folder: Path, rank: int, seed: int) -> None:
    """A PEFT folder with random values, small enough to keep the model sane."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (n, k) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator) / k**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * 0.02
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in SHAPES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def run(
    llm: polyaccel.LLM, prompts: list[list[int]], adapters: list[str | None], new: int
) -> tuple[float, list[object]]:
    """Decode tokens a second, and the completions' ids."""
    params = polyaccel.SamplingParams(max_tokens=new, min_tokens=new, temperature=0.0)
    out = llm.generate(prompts, params, adapter=adapters)
    first = max(o.timing.first_token for o in out)
    whole = max(o.timing.first_token + o.timing.decode for o in out)
    return len(prompts) * (new - 1) / (whole - first), [o.token_ids for o in out]


def check(llm: polyaccel.LLM, prompts: list[list[int]], names: list[str], tokens: int = 4) -> None:
    """Each adapter in the batch answers as it does merged into the base."""
    _, batched = run(llm, prompts, list(names), tokens)
    for prompt, name, expected in zip(prompts, names, batched, strict=True):
        llm.adapters.merge(name)
        _, merged = run(llm, [prompt], [None], tokens)
        llm.adapters.unmerge()
        if merged[0] != expected:
            raise SystemExit(f"adapter {name}: {expected} in the batch, {merged[0]} merged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new-tokens", type=int, default=128)
    add_common_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = [f"adapter-{i}" for i in range(arguments.batch)]
    generator = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(names):
            write_adapter(Path(folder) / name, arguments.rank, i)
        with polyaccel.LLM(
            smollm2(),
            backend="cpu",
            prefix_caching=False,
            max_model_len=2048,
            adapter_slots=arguments.batch,
            adapter_rank_rows=arguments.batch * arguments.rank,
            adapters={name: Path(folder) / name for name in names},
        ) as llm:
            check(llm, generator.integers(0, 49152, size=(arguments.batch, 16)).tolist(), names)
            for length in arguments.prompts:
                speeds: dict[str, list[float]] = {"base": [], "adapters": []}
                for repeat in range(arguments.repeats + 1):
                    prompts = generator.integers(0, 49152, size=(arguments.batch, length)).tolist()
                    base, _ = run(llm, prompts, [None] * arguments.batch, arguments.new_tokens)
                    adapted, _ = run(llm, prompts, list(names), arguments.new_tokens)
                    if repeat:
                        speeds["base"].append(base)
                        speeds["adapters"].append(adapted)
                base, adapted = (statistics.median(values) for values in speeds.values())
                rows.append(
                    {
                        "model": "SmolLM2-135M-Instruct",
                        "dtype": "float32",
                        "batch": arguments.batch,
                        "adapters": arguments.batch,
                        "rank": arguments.rank,
                        "modules": "q k v o gate up down",
                        "prompt_tokens": length,
                        "new_tokens": arguments.new_tokens,
                        "base_tokens_per_s": round(base, 1),
                        "adapters_tokens_per_s": round(adapted, 1),
                        "ratio": round(adapted / base, 3),
                        "repeats": arguments.repeats,
                    }
                )
    save("cpu_adapters", rows, enabled=not arguments.no_save)


if __name__ == "__main__":
    main()
