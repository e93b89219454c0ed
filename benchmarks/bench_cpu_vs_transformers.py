"""SmolLM2 on the CPU: polyaccel's public API against transformers' ``generate``, in one run.

    python benchmarks/bench_cpu_vs_transformers.py [--batches 1 8] [--prompts 128 1024] [--new-tokens 128]

Same weights, threads, dtype (float32) and prompts; greedy; both warmed up; the median of repeats, for ratios that of
the repeats' own ratios (neighbours in time). transformers gets sdpa, no_grad and equal prompt lengths (no padding).
The tokens are compared in the same run: they may differ only from
a position on where transformers' own best two logits are closer than rounding. ``of_bandwidth`` is the share of the
memory bandwidth, measured in the same run, that reading the weights once a step takes.

Each of the two lives in a process of its own, where it calls from the main thread, and they take turns: in one process
their OpenMP pools would make each other's workers sleep between loops.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from common import add_common_options, read_bandwidth, save, smollm2

import polyaccel

WEIGHT_BYTES = 134_515_008 * 4
CLOSE = 2e-3


class Reference:
    """transformers on the same GGUF file, read by its own reader."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        path = smollm2()
        self._model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    @torch.no_grad()
    def generate(self, prompts: np.ndarray, new_tokens: int) -> tuple[float, np.ndarray]:
        """Seconds and the new ids ``[batch, new_tokens]``."""
        ids = torch.from_numpy(prompts)
        begun = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - begun, out[:, ids.shape[1] :].numpy()

    @torch.no_grad()
    def margin(self, ids: np.ndarray) -> float:
        """Distance of the best two logits after ``ids``."""
        logits = self._model(torch.from_numpy(ids)[None]).logits[0, -1]
        best = torch.topk(logits, 2).values
        return float(best[0] - best[1])


def ours(llm: polyaccel.LLM, prompts: np.ndarray, new_tokens: int) -> tuple[float, float, np.ndarray]:
    """Seconds to the last first token, seconds of decode after it, and the new ids."""
    params = polyaccel.SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0)
    out = llm.generate(prompts.tolist(), params)
    first = max(o.timing.first_token for o in out)
    whole = max(o.timing.first_token + o.timing.decode for o in out)
    return first, whole - first, np.array([o.token_ids for o in out])


def compare(reference: Reference, prompts: np.ndarray, theirs: np.ndarray, mine: np.ndarray) -> int:
    """Sequences that differ by a tie; raises where they differ by more."""
    ties = 0
    for prompt, a, b in zip(prompts, theirs, mine, strict=True):
        different = np.flatnonzero(a != b)
        if len(different) == 0:
            continue
        place = int(different[0])
        margin = reference.margin(np.concatenate((prompt, a[:place])))
        if margin > CLOSE:
            raise SystemExit(f"tokens differ at {place} where the margin is {margin:.4f}: {a[place]} and {b[place]}")
        ties += 1
    return ties


_engine: list[Reference | polyaccel.LLM] = []


def start_theirs(threads: int) -> None:
    torch.set_num_threads(threads)
    _engine.append(Reference())


def start_ours(threads: int) -> None:
    _engine.append(polyaccel.LLM(smollm2(), backend="cpu", prefix_caching=False, max_model_len=2048, threads=threads))


def run_theirs(prompts: np.ndarray, new_tokens: int) -> tuple[float, np.ndarray]:
    reference = _engine[0]
    assert isinstance(reference, Reference)
    return reference.generate(prompts, new_tokens)


def run_ours(prompts: np.ndarray, new_tokens: int) -> tuple[float, float, np.ndarray]:
    llm = _engine[0]
    assert isinstance(llm, polyaccel.LLM)
    return ours(llm, prompts, new_tokens)


def run_compare(prompts: np.ndarray, theirs: np.ndarray, mine: np.ndarray) -> int:
    reference = _engine[0]
    assert isinstance(reference, Reference)
    return compare(reference, prompts, theirs, mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new-tokens", type=int, default=128)
    add_common_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    generator = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, start_theirs, (arguments.threads,)) as theirs,
        ProcessPoolExecutor(1, context, start_ours, (arguments.threads,)) as mine,
    ):
        for batch in arguments.batches:
            for length in arguments.prompts:
                rows.append(measure(mine, theirs, generator, batch, length, arguments, bandwidth))
                print(rows[-1], flush=True)
    save("cpu_vs_transformers", rows, enabled=not arguments.no_save)


def measure(
    our_process: ProcessPoolExecutor,
    their_process: ProcessPoolExecutor,
    generator: np.random.Generator,
    batch: int,
    length: int,
    arguments: argparse.Namespace,
    bandwidth: float,
) -> dict[str, object]:
    new = arguments.new_tokens
    times: dict[str, list[float]] = {name: [] for name in ("our prefill", "our step", "their prefill", "their step")}
    ties = 0
    for repeat in range(arguments.repeats + 1):
        prompts = generator.integers(0, 49152, size=(batch, length))
        first, rest, mine = our_process.submit(run_ours, prompts, new if repeat else 8).result()
        prefill, _ = their_process.submit(run_theirs, prompts, 1).result()
        whole, theirs = their_process.submit(run_theirs, prompts, new if repeat else 8).result()
        if repeat == 0:
            continue  # warms both
        ties += their_process.submit(run_compare, prompts, theirs, mine).result()
        times["our prefill"].append(first)
        times["our step"].append(rest / (new - 1))
        times["their prefill"].append(prefill)
        times["their step"].append((whole - prefill) / (new - 1))
    median = {name: statistics.median(values) for name, values in times.items()}

    def ratio(what: str) -> float:
        # Of neighbours in time: a machine that slows down for a minute slows both.
        return statistics.median(b / a for a, b in zip(times[f"our {what}"], times[f"their {what}"], strict=True))

    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "batch": batch,
        "prompt_tokens": length,
        "new_tokens": new,
        "prefill_tokens_per_s": round(batch * length / median["our prefill"], 1),
        "transformers_prefill_tokens_per_s": round(batch * length / median["their prefill"], 1),
        "prefill_ratio": round(ratio("prefill"), 3),
        "decode_tokens_per_s": round(batch / median["our step"], 1),
        "transformers_decode_tokens_per_s": round(batch / median["their step"], 1),
        "decode_ratio": round(ratio("step"), 3),
        "of_bandwidth": round(WEIGHT_BYTES / median["our step"] / bandwidth, 3),
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "sequences_differing_by_a_tie": ties,
        "repeats": arguments.repeats,
    }


if __name__ == "__main__":
    main()
