"""A Mistral-7B shape with random weights on a GPU through the public API: start-up, decode, adapters, the host's share.

    python benchmarks/bench_cuda_engine.py [--layers 32] [--batches 1 32 64] [--loaded 1 8 32 64] [--folder FOLDER]

Writes a checkpoint (14.5 GB at 32 layers) and one adapter of rank 32 on all linear layers into the folder, then:

- ``start-up``: a process of its own, with an empty kernel cache and again with a full one, from import to the first
  token; ``without_copy_s`` leaves out the time between the first and the last weight.
- ``decode``: tokens a second while all rows decode, prompts of 512 random tokens, 128 new ones, greedy; the median of
  the repeats, which the mixes of adapters take in turn. A step's budget of tokens holds the prompts of all rows, so
  that they have their first token in one step and their last in one, and every step between has all rows. Adapters
  are loads of the same file under several names; batch 1 is taken with every number of them loaded, a larger batch
  with as many as it has rows. ``added``: against rows without one, as many being loaded.
- ``host gap``: the share of the same steps in which no kernel runs, from the profiler's records of them.
  ``unprofiled``: what the kernels take there, of the step that no profiler made longer.
- ``correct``: transformers reads the same folder. In float32 it must like our tokens best, or less than its best by no
  more than twice what bfloat16 changes in its own logits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from common import save
from random_checkpoint import VOCABULARY, write_adapter, write_checkpoint

import polyaccel

Mix = TypeVar("Mix")


# -- start-up ----------------------------------------------------------------------------------------------------------


def start(model: Path) -> None:
    """What the process of its own does: prints its seconds as JSON."""
    begun = float(os.environ["BEGUN"])
    copied: list[float] = []
    llm = polyaccel.LLM(model, **OPTIONS, load_progress=lambda done, total: copied.append(time.time()))
    loaded = time.time()
    out = llm.generate([list(range(3, 515))], polyaccel.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    llm.close()
    first = loaded + out[0].timing.first_token
    seconds = {
        "to_first_token_s": first - begun,
        "copy_s": copied[-1] - copied[0],
        "without_copy_s": first - begun - (copied[-1] - copied[0]),
        "import_s": IMPORTED - begun,
        "load_s": loaded - IMPORTED,
        "first_token_s": out[0].timing.first_token,
    }
    print(json.dumps({name: round(value, 2) for name, value in seconds.items()}))


def start_up(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as cache:
        for kernels in ("cold", "warm"):
            variables = {**os.environ, "POLYACCEL_CACHE": cache, "BEGUN": str(time.time())}
            command = [sys.executable, __file__, "--start", str(folder / "model")]
            found = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True, text=True).stdout
            rows.append({"what": "start-up", "kernels": kernels, **json.loads(found.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


# -- decode ------------------------------------------------------------------------------------------------------------


def decode(
    llm: polyaccel.LLM, prompts: list[list[int]], mixes: Mapping[Mix, list[str | None]], new: int, repeats: int
) -> dict[Mix, tuple[float, list[list[int]]]]:
    """By mix, decode tokens a second, the median, and the ids of the last run. Mixes take turns: what drifts, such as
    the clock, is then no difference between them.

    Raises:
        SystemExit: rows had their first token in different steps; some steps had then fewer rows than others.
    """
    params = polyaccel.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    speeds: dict[Mix, list[float]] = {mix: [] for mix in mixes}
    ids: dict[Mix, list[list[int]]] = {}
    for repeat in range(repeats + 1):
        for mix, names in mixes.items():
            out = llm.generate(prompts, params, adapter=names)
            took = [o.timing.decode for o in out]
            if max(took) - min(took) > max(took) / (2 * new):
                raise SystemExit(f"rows decoded for {min(took):.4f} to {max(took):.4f} s: raise max_batched_tokens")
            if repeat:
                speeds[mix].append(len(prompts) * (new - 1) / max(took))
            ids[mix] = [list(o.token_ids) for o in out]
    return {mix: (statistics.median(found), ids[mix]) for mix, found in speeds.items()}


def busy_share(llm: polyaccel.LLM, prompts: list[list[int]], names: list[str | None], new: int) -> tuple[float, float]:
    """Share of the time in which a kernel or copy runs, and microseconds a step, over the steps of :func:`decode`."""
    from torch.profiler import ProfilerActivity, profile

    params = polyaccel.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        llm.generate(prompts, params, adapter=names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return busy_of([(float(e["ts"]), float(e["dur"]), e["name"]) for e in device], new)


def busy_of(records: list[tuple[float, float, str]], new: int) -> tuple[float, float]:
    """Of the begin, duration and name of what ran, in microseconds.

    Raises:
        SystemExit: there are fewer steps than tokens of a row.
    """
    spans = sorted((begin, begin + took, name) for begin, took, name in records)
    # A step ends with its sampling: the first of them with the prompts', and one more may follow the last token.
    ends = [end for _, end, name in spans if "sample" in name.lower()]
    marks = ends or [end for _, end, name in spans if "argmax" in name.lower()]
    if len(marks) < new:
        raise SystemExit(f"the profiler saw {len(marks)} of {new} steps")
    low, high = marks[0], marks[new - 1]
    busy, reached = 0.0, low
    for begin, end, _ in spans:
        begin, end = max(begin, reached), min(end, high)
        if end > begin:
            busy += end - begin
            reached = end
    return busy / (high - low), (high - low) / (new - 1)


def correct(model: Path, prompt: list[int], ids: list[int]) -> dict[str, object]:
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda()
    whole = torch.tensor([prompt + ids], device="cuda")
    with torch.inference_mode():
        rough = theirs(whole).logits[0, len(prompt) - 1 : -1].float()
        fine = theirs.float()(whole).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(ids, device="cuda")[:, None]
    short = (fine.amax(-1) - fine.gather(1, chosen)[:, 0]).max().item()
    noise = (rough - fine).abs().max().item()
    same = (fine.argmax(-1) == chosen[:, 0]).float().mean().item()
    del theirs
    torch.cuda.empty_cache()
    row = {"what": "correct", "tokens": len(ids), "same_as_float32": same, "short_of_best": short, "bfloat16": noise}
    if short > 2 * noise:
        raise SystemExit(f"wrong tokens: {row}")
    return row


OPTIONS: dict[str, Any] = {
    "backend": os.environ.get("BACKEND", "auto"),
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "prefix_caching": False,
    "memory_fraction": 0.45,
    "executor": "inline",
}
IMPORTED = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/polyaccel-bench"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--loaded", type=int, nargs="+", default=[1, 8, 32, 64], help="numbers of adapters loaded")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    if arguments.start is not None:
        start(arguments.start)
        return
    model, adapter = arguments.folder / "model", arguments.folder / "adapter"
    if not model.exists():
        write_checkpoint(model, arguments.layers)
        write_adapter(adapter, arguments.layers, arguments.rank)
    torch.cuda.empty_cache()
    rows = start_up(arguments.folder)
    generator = np.random.default_rng(0)
    most = max(arguments.loaded)
    own = [f"adapter-{i}" for i in range(most)]
    slots = {"adapter_slots": most, "adapter_rank_rows": most * arguments.rank}
    # Prompts of all rows in one step.
    budget = max(2048, max(arguments.batches) * arguments.prompt)
    with polyaccel.LLM(model, **OPTIONS, **slots, max_batched_tokens=budget) as llm:
        print(llm.explain(), flush=True)
        kept: tuple[list[int], list[int]] | None = None
        drawn_prompts = {
            b: generator.integers(3, VOCABULARY, (b, arguments.prompt)).tolist() for b in arguments.batches
        }
        before = 0
        for loaded in sorted({0, *arguments.loaded}):
            for name in own[before:loaded]:
                llm.adapters.load(name, adapter)
            before = loaded
            for batch, prompts in drawn_prompts.items():
                if batch > 1 and loaded not in (0, batch):
                    continue
                mixes: dict[str, list[str | None]] = {"none": [None] * batch}
                if loaded:
                    mixes["one" if batch == 1 else "all rows one"] = [own[0]] * batch
                if loaded and 1 < batch <= loaded:
                    mixes["each row its own"] = list(own[:batch])
                measured = decode(llm, prompts, mixes, arguments.new_tokens, arguments.repeats)
                for mix, names in mixes.items():
                    speed, ids = measured[mix]
                    busy, step = busy_share(llm, prompts, names, arguments.new_tokens)
                    kept = kept or (prompts[0], ids[0])
                    ms, plain = batch / speed * 1e3, batch / measured["none"][0] * 1e3
                    row: dict[str, object] = {
                        "what": "decode",
                        "batch": batch,
                        "loaded": loaded,
                        "adapters": mix,
                        "tokens_per_s": round(speed, 1),
                        "ms_per_step": round(ms, 3),
                        "added_ms": round(ms - plain, 3),
                        "added": round(ms / plain - 1, 4),
                        "profiled_ms_per_step": round(step / 1e3, 3),
                        "host_gap": round(1 - busy, 4),
                        "host_gap_unprofiled": round(1 - busy * step / 1e3 / ms, 4),
                    }
                    rows.append(row)
                    print(row, flush=True)
    assert kept is not None
    torch.cuda.empty_cache()
    rows.append(correct(model, *kept))
    save("cuda_engine", rows, enabled=not arguments.no_save, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
