"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from polyaccel.backend.plan import Policy
from polyaccel.engine.config import DType, ExecutorKind
from polyaccel.observe.progress import ProgressBar

if TYPE_CHECKING:
    from polyaccel.engine.llm import LLM
    from polyaccel.engine.sampling_params import SamplingParams

Commands = argparse._SubParsersAction


class UsageError(Exception):
    """The command line is wrong in a way that argparse cannot see."""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, a .gguf file, or a hub id found in the local cache")
    group = parser.add_argument_group("engine")
    group.add_argument("--backend", default="auto", help='an installed backend, or "auto" (default)')
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks that share every layer")
    group.add_argument("--dtype", choices=get_args(DType), default="auto")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest sequence in tokens")
    group.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="sequences that run at once")
    group.add_argument("--max-batched-tokens", type=int, default=2048, metavar="N", help="token budget of a step")
    group.add_argument(
        "--memory-fraction", type=float, default=0.9, metavar="F", help="of free memory, for the KV cache"
    )
    group.add_argument("--kv-cache-bytes", type=int, metavar="N")
    group.add_argument("--executor", choices=get_args(ExecutorKind), default="auto")
    group.add_argument("--policy", choices=get_args(Policy), default="warn", help="when only a composite is available")
    group.add_argument("--batch-invariant", action="store_true", help="the same bits whatever else is served; slower")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of each worker")
    group.add_argument("--no-overlap", action="store_true", help="do not prepare a step while the one before runs")
    group.add_argument("--no-graphs", action="store_true", help="do not capture decode steps")
    group.add_argument("--no-prefix-caching", action="store_true")
    group.add_argument("--adapter-slots", type=int, default=8, metavar="N", help="adapters resident at once")
    group.add_argument(
        "--adapter-rank-rows", type=int, default=512, metavar="N", help="sum of resident adapters' ranks"
    )
    group.add_argument(
        "--load-adapter", action="append", default=[], metavar="NAME=FOLDER", help="an adapter to load; may be repeated"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the output; may be repeated")
    group.add_argument(
        "--adapter", metavar="NAME[=WEIGHT][,NAME=WEIGHT...]", help="a loaded adapter, or a weighted mix"
    )


def open_llm(options: argparse.Namespace, **overrides: Any) -> LLM:
    """Start the engine as the options say, with a progress bar for the weights."""
    from polyaccel.engine.llm import LLM

    with ProgressBar("loading", unit="B", enabled=not options.no_progress) as bar:
        settings: dict[str, Any] = {
            "backend": options.backend,
            "tensor_parallel_size": options.tensor_parallel_size,
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "max_batched_tokens": options.max_batched_tokens,
            "memory_fraction": options.memory_fraction,
            "kv_cache_bytes": options.kv_cache_bytes,
            "executor": options.executor,
            "policy": options.policy,
            "batch_invariant": options.batch_invariant,
            "threads": options.threads,
            "overlap": not options.no_overlap,
            "graphs": not options.no_graphs,
            "prefix_caching": not options.no_prefix_caching,
            "adapter_slots": options.adapter_slots,
            "adapter_rank_rows": options.adapter_rank_rows,
            "adapters": _named_folders(options.load_adapter),
            "load_progress": bar,
        }
        return LLM(options.model, **{**settings, **overrides})


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    from polyaccel.engine.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        stop=options.stop,
    )


def adapter_mix(text: str | None) -> dict[str, float] | None:
    """``pirate`` or ``pirate=0.5,json=0.5`` as name to weight."""
    if text is None:
        return None
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        if name in mix:
            raise UsageError(f"--adapter {text!r} names {name!r} twice; add its weights")
        try:
            mix[name] = float(weight) if weight else 1.0
        except ValueError:
            raise UsageError(f"--adapter {text!r}: the weight of {name!r} is not a number: {weight!r}") from None
    return mix


def _named_folders(texts: Sequence[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not separator or not name or not folder:
            raise UsageError(f"--load-adapter {text!r} is not of the form NAME=FOLDER")
        if name in folders:
            raise UsageError(f"--load-adapter names {name!r} twice")
        folders[name] = folder
    return folders
