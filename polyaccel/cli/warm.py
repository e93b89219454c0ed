"""``polyaccel warm MODEL``: compile and cache what a server of this model would compile on its first requests."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyaccel.cli.kernel_folders import cache_root, kernel_folders
from polyaccel.cli.options import Commands, add_engine_options, open_llm
from polyaccel.observe.progress import ProgressBar

if TYPE_CHECKING:
    from polyaccel.engine.llm import LLM

Mix = tuple[str | None, ...]
"""Adapters, or none, that are dealt to the requests of a round in turn."""

# Kernels are compiled apart for one row, for a multiple of 16 and for other numbers, for few rows and for many.
PREFILL_TOKENS = (1, 7, 16, 33, 64, 100, 256)
DECODE_PROMPT = 2


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("warm", help="compile and cache the kernels of a model before it is served")
    add_engine_options(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Requests that are answered together: how many, of how many prompt and new tokens."""

    requests: int
    prompt: int
    new: int
    mix: Mix


def run(options: argparse.Namespace) -> int:
    begun = time.perf_counter()
    before = _cached()
    with open_llm(options) as llm:
        loaded = time.perf_counter()
        backend = llm.config.backend
        with ProgressBar("warming", unit="answers", enabled=not options.no_progress) as bar:
            done = _warm(llm, backend, bar)
    ended = time.perf_counter()
    # The last used comes first: the one of this start.
    kept = kernel_folders(backend)[:1]
    now = {place: name for place, name in _cached().items() if place[:2] == (backend, kept[0].key)} if kept else {}
    compiled = Counter(name for place, name in now.items() if place not in before)
    report = {
        "model": options.model,
        "backend": backend,
        "batch_sizes": sorted({round_.requests for round_ in done if round_.new > 1}),
        "adapters": [text.partition("=")[0] for text in options.load_adapter],
        "load_seconds": loaded - begun,
        "warm_seconds": ended - loaded,
        "compiled": dict(sorted(compiled.items())),
        "cached_before": len(now) - compiled.total(),
        "cache": str(kept[0].path) if kept else None,
    }
    if options.json:
        print(json.dumps(report))
        return 0
    print(f"{options.model} on {backend}")
    print(f"load      {loaded - begun:8.2f} s")
    print(f"warm      {ended - loaded:8.2f} s")
    if not kept:
        print(f"backend {backend!r} keeps no kernels in {cache_root()}: nothing to cache")
        return 0
    print(f"compiled  {compiled.total():8}, {report['cached_before']} were in the cache before")
    for name, count in sorted(compiled.items()):
        print(f"{count:18}  {name}")
    return 0


def _cached() -> dict[tuple[str, str, str], str]:
    """The kernel's name by backend, key and entry."""
    return {
        (cache.backend, cache.key, entry): name for cache in kernel_folders() for entry, name in cache.entries().items()
    }


def _warm(llm: LLM, backend: str, progress: ProgressBar) -> list[Round]:
    """The rounds that were answered: the first alone where the backend keeps no kernels."""
    rounds = _rounds(llm)
    total = sum(round_.requests for round_ in rounds)
    done: list[Round] = []
    for round_ in rounds:
        _answer(llm, round_, seed=len(done))
        done.append(round_)
        progress(sum(answered.requests for answered in done), total)
        # A backend that keeps kernels has made its folder by now.
        if len(done) == 1 and not kernel_folders(backend):
            break
    return done


def _rounds(llm: LLM) -> list[Round]:
    """Prompts of several lengths, then every number of rows that a decode graph would be captured for.

    All of it without adapters, then with one adapter of each rank, then with base and adapters in one batch.
    """
    from polyaccel.engine.graphs import row_buckets

    capacity, budget = llm.engine.executor.capacity, llm.config.max_batched_tokens
    longest = max(1, min(capacity.max_model_len - 1, budget))
    lengths = sorted({min(length, longest) for length in (*PREFILL_TOKENS, longest)})
    names = list(llm.adapters)
    by_rank = {llm.adapters.receipt(name).max_rank: name for name in names}
    mixes: list[Mix] = [(None,), *((name,) for name in by_rank.values())]
    if names:
        mixes.append((None, *names))
    rounds: list[Round] = []
    for mix in mixes:
        rounds += [Round(requests=1, prompt=length, new=1, mix=mix) for length in lengths]
        for size in row_buckets(capacity.request_slots):
            prompt = min(DECODE_PROMPT, longest)
            # Where the prompts do not fit into one step, the first must go on until the last are there.
            new = 2 + -(-size * prompt // max(1, budget - size))
            most = capacity.max_model_len - prompt
            rounds.append(Round(requests=size, prompt=prompt, new=max(1, min(new, most)), mix=mix))
    return rounds


def _answer(llm: LLM, round_: Round, *, seed: int) -> None:
    from polyaccel.engine.sampling_params import SamplingParams

    draw = random.Random(seed)
    vocabulary = llm.engine.executor.capacity.vocabulary
    prompts = [[draw.randrange(vocabulary) for _ in range(round_.prompt)] for _ in range(round_.requests)]
    adapters = [round_.mix[index % len(round_.mix)] for index in range(round_.requests)]
    params = SamplingParams(max_tokens=round_.new, temperature=0.0, ignore_eos=True)
    llm.generate(prompts, params, adapter=adapters)
