"""``polyaccel bench MODEL``: prefill and decode speed through the public API, on random prompts."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from polyaccel.cli.options import Commands, UsageError, add_engine_options, open_llm


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure tokens per second of prefill and decode")
    add_engine_options(parser)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the median is reported")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME", help="dealt to requests in turn")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from polyaccel.engine.sampling_params import SamplingParams

    for name in ("batch_size", "repeats"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    params = SamplingParams(max_tokens=options.new_tokens, temperature=0.0, ignore_eos=True)
    names: list[str | None] = list(options.adapter) or [None]
    adapters = [names[i % len(names)] for i in range(options.batch_size)]
    generator = random.Random(0)
    begun = time.perf_counter()
    with open_llm(options) as llm:
        load = time.perf_counter() - begun
        vocabulary = llm.engine.executor.capacity.vocabulary
        prefill: list[float] = []
        decode: list[float] = []
        for repeat in range(options.repeats + 1):
            prompts = [
                [generator.randrange(vocabulary) for _ in range(options.prompt_tokens)]
                for _ in range(options.batch_size)
            ]
            completions = llm.generate(prompts, params, adapter=adapters)
            if repeat == 0:
                continue  # warms caches and captures graphs
            first = max(c.timing.first_token for c in completions)
            rest = max(c.timing.first_token + c.timing.decode for c in completions) - first
            prefill.append(options.batch_size * options.prompt_tokens / first)
            decode.append(options.batch_size * (options.new_tokens - 1) / rest if rest > 0 else 0.0)
        backend = llm.config.backend
    report = {
        "model": options.model,
        "backend": backend,
        "tensor_parallel_size": options.tensor_parallel_size,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "adapters": options.adapter,
        "repeats": options.repeats,
        "load_seconds": load,
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode),
    }
    if options.json:
        print(json.dumps(report))
        return 0
    print(
        f"{report['model']} on {backend}, batch {options.batch_size}, {options.prompt_tokens} + {options.new_tokens} "
        f"tokens"
    )
    print(f"load     {load:8.2f} s")
    print(f"prefill  {report['prefill_tokens_per_second']:8.1f} tokens/s")
    print(f"decode   {report['decode_tokens_per_second']:8.1f} tokens/s")
    return 0
