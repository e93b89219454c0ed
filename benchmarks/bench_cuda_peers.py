"""What adapters add on one GPU, here and with the kernels that others use, in one run.

    python benchmarks/bench_cuda_peers.py [--vllm FOLDER] [--layers 32] [--batches 1 32 64] [--rank 32]

A Mistral-7B shape, random bfloat16 weights, adapters on all seven linear layers; ``FOLDER``: see ``vllm_lora.py``.

- ``decode``: a whole step of 32 layers, lm_head and sampling in a CUDA graph, which with its weights of 14 GB leaves
  nothing in the L2 cache for the next. ``polyaccel``: the stations of the backend. ``cublas``: the same step with the
  products by cuBLAS, and ``vllm``, beside it, with vLLM's ``lora_shrink`` and ``lora_expand`` after each of them,
  launched as wide as there are adapters. Medians of replays that take turns; a step's metadata are on the device
  before the clock starts. ``added``: against the step without adapters that has the same products; ``floor_ms``: the
  whole step's bytes and ``added_floor_ms`` the adapters' alone at the bandwidth measured in the same run.
- ``prefill``: microseconds a layer of a step of 2,048 tokens, launched kernel by kernel while the device waits, in one
  segment and in 32 with an adapter each; ``floor_us``: the adapters' arithmetic at 700 TFLOP/s or their bytes.
- ``peft``: one layer of transformers' Mistral, one token, eager, the host included; the adapter of PEFT, unmerged.

Before anything is timed, each station's rows are compared with float64: ``worst`` is the largest error of a row in
units of what adapters change in one; above 0.05 the run ends. A peer that is not there is said not to be installed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cuda_prefill import FLOPS, Prefill
from common import save
from cuda_model import Model, Shape
from peft_layer import peft_row
from sides import BASE, CUBLAS, OURS, VLLM, Sides, per_rank
from turns import bandwidth, device_name, in_turns
from vllm_lora import VllmLora, load


def decode(
    shape: Shape,
    lora: VllmLora | None,
    *,
    rank: int,
    batches: Sequence[int],
    context: int,
    repeats: int,
    speed: float,
    **options: Any,
) -> list[dict[str, object]]:
    """``options``: of the model."""
    most = max(batches)
    model = Model(shape, rank_rows=most * rank, slots=most, rows=most, context=context, **options)
    sides, rows = Sides(model, lora, rank=rank), list[dict[str, object]]()
    for batch in batches:
        mixes = {"all rows one": [0] * batch, "each row its own": list(range(batch))}
        if batch == 1:
            mixes = {"one": [0]}
        rows += [{"what": "decode", **row} for row in sides.decode(batch, mixes, repeats, speed)]
    sides.close()
    model.backend.close()
    return rows


def prefill(
    shape: Shape,
    lora: VllmLora | None,
    *,
    rank: int,
    tokens: int,
    segments: Sequence[int],
    repeats: int,
    speed: float,
    **options: Any,
) -> list[dict[str, object]]:
    """``options``: of the model."""
    most, rows = max(segments), list[dict[str, object]]()
    model = Model(shape, rank_rows=most * rank, slots=most, rows=most, context=tokens - 1, **options)
    sides = Sides(model, lora, rank=rank)
    elements = rank * per_rank(model, 0) // model.dtype.itemsize
    for count in segments:
        slots = [i for i in range(count) for _ in range(tokens // count)]
        plain, named = Prefill(model, tokens, count, None), Prefill(model, tokens, count, list(range(count)))
        worst = sides.checked(slots, named.step, plain.step)
        base = Prefill(model, tokens, count, None, sides.stations(None))
        forms = {(OURS, "none"): plain, (CUBLAS, "none"): base, (OURS, "each its own"): named}
        if (stations := sides.stations(slots)) is not None:
            forms[VLLM, "each its own"] = Prefill(model, tokens, count, None, stations)
        times = {key: ms * 1e3 / shape.layers for key, ms in in_turns(forms, repeats, queued=True).items()}
        floor = max(2 * tokens * elements / FLOPS, count * elements * model.dtype.itemsize / speed) * 1e6
        for (side, mix), took in times.items():
            row: dict[str, object] = {"what": "prefill", "kernels": side, "tokens": tokens, "segments": count}
            row |= {"adapters": mix, "us_per_layer": round(took, 1)}
            if mix != "none":
                added = took - times[BASE[side], "none"]
                row |= {"rank": rank, "added_us_per_layer": round(added, 1), "added": f"{added / (took - added):.1%}"}
                row |= {"added_floor_us": round(floor, 1), "worst": round(worst[side], 4)}
            rows.append(told(row))
    sides.close()
    model.backend.close()
    return rows


def told(row: dict[str, object]) -> dict[str, object]:
    print(row, flush=True)
    return row


def freed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="folder that holds vllm/lora/ops/triton_ops")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--context", type=int, default=544)
    parser.add_argument("--prefill-layers", type=int, default=8)
    parser.add_argument("--prefill-rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    speed, lora = bandwidth(), load(arguments.vllm)
    print(f"{device_name()}  {speed / 1e12:.2f} TB/s", flush=True)
    rows = [told({"what": "peer", "kernels": VLLM, "version": lora.version if lora else "not installed"})]
    rows += decode(
        Shape(layers=arguments.layers),
        lora,
        rank=arguments.rank,
        batches=arguments.batches,
        context=arguments.context,
        repeats=arguments.repeats,
        speed=speed,
    )
    freed()
    rows += prefill(
        Shape(layers=arguments.prefill_layers),
        lora,
        rank=arguments.prefill_rank,
        tokens=arguments.tokens,
        segments=arguments.segments,
        repeats=arguments.repeats,
        speed=speed,
    )
    freed()
    rows.append(told(peft_row(Shape(), arguments.rank, arguments.repeats)))
    save("cuda_peers", rows, enabled=not arguments.no_save, device=device_name())


if __name__ == "__main__":
    main()
