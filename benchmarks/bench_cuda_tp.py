"""Decode of a Mistral-7B shape with random weights on two GPUs over one, through the public API.

    python benchmarks/bench_cuda_tp.py [--layers 32] [--batches 1 32] [--world 2] [--folder /dev/shm/polyaccel-tp]

Writes a checkpoint (14.5 GB at 32 layers) and one adapter of rank 32 on all linear layers into the folder, unless they
are there. Tokens a second while all rows decode, prompts of 128 random tokens, 64 new ones, greedy, the median of the
repeats, with and without an adapter in turn; workers are processes in both cases. ``same_tokens``: the share of tokens
that are those of one GPU; in bfloat16 a sum in another order may choose another one of two near-equal logits, and all
after it differ.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cuda_engine import decode
from common import save
from random_checkpoint import VOCABULARY, write_adapter, write_checkpoint

import polyaccel

RANK = 32
Ids = list[list[int]]


def measured(folder: Path, world: int, arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[Any, Ids]]:
    """Rows and ids by batch and adapter."""
    rows: list[dict[str, object]] = []
    said: dict[Any, Ids] = {}
    begun = time.monotonic()
    with polyaccel.LLM(
        folder / "model",
        backend="cuda",
        executor="process",
        tensor_parallel_size=world,
        max_model_len=512,
        max_num_seqs=max(arguments.batches),
        max_batched_tokens=max(2048, max(arguments.batches) * arguments.prompt),
        prefix_caching=False,
        memory_fraction=0.3,
        adapter_slots=4,
        adapter_rank_rows=4 * RANK,
        timeout=120.0,
    ) as llm:
        ready = time.monotonic() - begun
        llm.adapters.load("one", folder / "adapter")
        for batch in arguments.batches:
            generator = np.random.default_rng(batch)
            prompts = generator.integers(3, VOCABULARY, (batch, arguments.prompt)).tolist()
            mixes = {adapter: [adapter] * batch for adapter in (None, "one")}
            found = decode(llm, prompts, mixes, arguments.new_tokens, arguments.repeats)
            for adapter, (speed, ids) in found.items():
                said[batch, adapter] = ids
                row: dict[str, object] = {
                    "what": "decode",
                    "ranks": world,
                    "batch": batch,
                    "adapter": adapter,
                    "layers": arguments.layers,
                    "tokens_per_s": round(speed, 1),
                    "ms_per_step": round(batch / speed * 1e3, 3),
                    "ready_s": round(ready, 1),
                }
                rows.append(row)
                print(row, flush=True)
        for report in llm.explain().ranks:
            ledger = report["ledger"]
            assert isinstance(ledger, dict)
            sums = {name: count for name, count in ledger.items() if "reduce" in name or "gather" in name}
            plan: Any = report["plan"]
            details = {e["decode"]["detail"] for e in plan["sites"].values() if e["decode"]["operator"] == "all_reduce"}
            print(report["transport"], report["graphs"], report["graph_refusals"], sums, sorted(details), flush=True)
    return rows, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/polyaccel-tp"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    if not (arguments.folder / "adapter").exists():
        begun = time.monotonic()
        write_checkpoint(arguments.folder / "model", arguments.layers)
        write_adapter(arguments.folder / "adapter", arguments.layers, RANK)
        print(f"written in {time.monotonic() - begun:.1f} s", flush=True)
    torch.cuda.empty_cache()
    alone, theirs = measured(arguments.folder, 1, arguments)
    together, ours = measured(arguments.folder, arguments.world, arguments)
    for one, several in zip(alone, together, strict=True):
        key = (one["batch"], one["adapter"])
        pairs = [(a, b) for x, y in zip(theirs[key], ours[key], strict=True) for a, b in zip(x, y, strict=True)]
        several["same_tokens"] = round(sum(a == b for a, b in pairs) / len(pairs), 4)
        several["over_one_gpu"] = round(float(str(several["tokens_per_s"])) / float(str(one["tokens_per_s"])), 3)
    name = f"{torch.cuda.get_device_name()} x{arguments.world}"
    save("cuda_tp", [*alone, *together], enabled=not arguments.no_save, device=name)


if __name__ == "__main__":
    main()
