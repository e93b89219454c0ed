"""What ``batch_invariant`` costs: a Mistral-7B shape with random weights, with the option and without, in turns.

    python benchmarks/bench_cuda_batch_invariant.py [--layers 32] [--batches 1 32] [--folder FOLDER]

``prefill``: the time to the first token of four prompts of 512 tokens in one step. ``decode``: tokens a second, without
adapters and with one of rank 32 on every row. Medians of the repeats. ``same bits``: with the option, the first row's
tokens and log-probabilities of the largest batch are those of the row alone.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from bench_cuda_engine import OPTIONS, decode
from common import save
from random_checkpoint import VOCABULARY, write_adapter, write_checkpoint

import polyaccel

PROMPTS, PROMPT, NEW = 4, 512, 64


def first_token(llm: polyaccel.LLM, prompts: list[list[int]], name: str | None) -> float:
    """Seconds to the last prompt's first token."""
    params = polyaccel.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    return max(o.timing.first_token for o in llm.generate(prompts, params, adapter=name))


def answer(llm: polyaccel.LLM, prompts: list[list[int]]) -> list[object]:
    """Tokens and the best tokens' log-probabilities of the first row."""
    params = polyaccel.SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=5)
    out = llm.generate(prompts, params)[0]
    return [tuple(out.token_ids), [one.top for one in out.logprobs or ()]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/polyaccel-bench"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    model, adapter = arguments.folder / "model", arguments.folder / "adapter"
    if not model.exists():
        write_checkpoint(model, arguments.layers)
        write_adapter(adapter, arguments.layers, arguments.rank)
    torch.cuda.empty_cache()
    most = max(*arguments.batches, PROMPTS)
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (most, PROMPT)).tolist()
    options = {**OPTIONS, "memory_fraction": 0.3, "max_batched_tokens": most * PROMPT, "adapters": {"a": adapter}}
    rows: list[dict[str, object]] = []
    with (
        polyaccel.LLM(model, **options) as plain,
        polyaccel.LLM(model, **options, batch_invariant=True) as invariant,
    ):
        engines = {False: plain, True: invariant}
        alone, crowd = answer(invariant, prompts[:1]), answer(invariant, prompts)
        if alone != crowd:
            raise SystemExit("batch_invariant: a row in its batch has other bits than alone")
        rows.append({"what": "same bits", "batch": most, "tokens": NEW})
        for name in (None, "a"):
            times: dict[bool, list[float]] = {False: [], True: []}
            for repeat in range(arguments.repeats + 1):
                for kind, llm in engines.items():
                    took = first_token(llm, prompts[:PROMPTS], name)
                    if repeat:
                        times[kind].append(took * 1e3)
            without, with_it = (statistics.median(times[kind]) for kind in (False, True))
            cost = round(with_it / without - 1, 3)
            rows.append(
                {
                    "what": "prefill",
                    "tokens": PROMPTS * PROMPT,
                    "adapter": name or "none",
                    "ms": round(without, 2),
                    "invariant_ms": round(with_it, 2),
                    "cost": cost,
                }
            )
            print(rows[-1], flush=True)
        for batch in arguments.batches:
            for name in (None, "a"):
                mixes = {"mix": [name] * batch}
                speeds = {k: decode(e, prompts[:batch], mixes, NEW, arguments.repeats) for k, e in engines.items()}
                without, with_it = (speeds[kind]["mix"][0] for kind in (False, True))
                rows.append(
                    {
                        "what": "decode",
                        "batch": batch,
                        "adapter": name or "none",
                        "tokens_per_s": round(without, 1),
                        "invariant_tokens_per_s": round(with_it, 1),
                        "cost": round(without / with_it - 1, 3),
                    }
                )
                print(rows[-1], flush=True)
    save("cuda_batch_invariant", rows, enabled=not arguments.no_save, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
