"""What adapters add to a layer's prefill on a GPU: 2,048 tokens in one segment, or in 32 with an adapter each.

    python benchmarks/bench_cuda_prefill.py [--layers 8] [--tokens 2048] [--segments 1 8 32] [--ranks 16 64]

A Mistral-7B shape with random weights, adapters on all seven linear layers; microseconds a layer, the median of eager
steps, with and without adapters in turn. ``floor`` is the arithmetic of the deltas at 700 TFLOP/s and their bytes at
the bandwidth measured in the run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import numpy as np
import torch
from common import save
from cuda_model import Model, Shape, Stations
from turns import bandwidth, device_name, in_turns

from polyaccel.backend import Step, StepInput, TokenClass
from polyaccel.backend.step import AdapterRows

FLOPS = 700e12


def step(model: Model, tokens: int, segments: int, slots: list[int] | None) -> Step:
    """``segments`` sequences of equal length, each with the adapter of its slot."""
    length, size = tokens // segments, model.backend.kv_block_size()
    tables = (np.arange(segments)[:, None] * model.blocks + np.arange(model.blocks)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int64), segments)
    owners = np.repeat(np.arange(segments), length)
    triples = AdapterRows()
    if slots:
        chosen = np.array(slots, dtype=np.int32)[owners]
        triples = AdapterRows.build(np.arange(tokens, dtype=np.int32), chosen, np.ones(tokens, dtype=np.float32))
    ends = (np.arange(segments) + 1) * length - 1
    inputs = StepInput(
        token_class=TokenClass.MIXED,
        token_ids=np.full(tokens, 7, dtype=np.int64),
        positions=positions,
        query_starts=np.arange(segments + 1, dtype=np.int32) * length,
        context_lengths=np.full(segments, length, dtype=np.int32),
        block_tables=tables,
        kv_slots=tables[owners, positions // size].astype(np.int64) * size + positions % size,
        request_slots=np.arange(segments, dtype=np.int32),
        logits_rows=ends.astype(np.int32),
        sample_slots=np.arange(segments, dtype=np.int32),
        uniforms=np.zeros(segments, dtype=np.float32),
        adapters={"tokens": triples} if slots else {},
    )
    return model.backend.begin_step(inputs, model.state, model.device)


class Prefill:
    """A prefill step; one of :func:`in_turns`'s forms. ``stations``: in place of the model's own."""

    def __init__(
        self, model: Model, tokens: int, segments: int, slots: list[int] | None, stations: Stations | None = None
    ) -> None:
        self._of = (model, tokens, segments, slots)
        self._run = functools.partial(model, stations=stations)

    def step(self) -> Step:
        return step(*self._of)

    def __call__(self) -> Callable[[], object]:
        return functools.partial(self._run, self.step())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    most, tokens = max(arguments.segments), arguments.tokens
    speed, rows = bandwidth(), []
    print(f"{device_name()}  {speed / 1e12:.2f} TB/s", flush=True)
    for rank in arguments.ranks:
        model = Model(Shape(layers=arguments.layers), rank_rows=most * rank, slots=most, rows=most, context=tokens - 1)
        for slot in range(most):
            model.load_adapter(slot, rank)
        adapted = [w for site, w in model.weights.items() if site.startswith("0.")]
        elements = sum(rank * (w.spec.k * len(w.spec.slices) + w.spec.n) for w in adapted)
        for segments in arguments.segments:
            mixes = {"none": None, "own": list(range(segments))}
            forms = {mix: Prefill(model, tokens, segments, slots) for mix, slots in mixes.items()}
            times = in_turns(forms, arguments.repeats, queued=True)
            base, with_adapters = (times[mix] * 1e3 / arguments.layers for mix in ("none", "own"))
            added = with_adapters - base
            floor = max(2 * tokens * elements / FLOPS, segments * elements * 2 / speed) * 1e6
            row: dict[str, object] = {
                "tokens": tokens,
                "rank": rank,
                "segments": segments,
                "base_us_per_layer": round(base, 1),
                "added_us_per_layer": round(added, 1),
                "added": round(added / base, 4),
                "floor_us_per_layer": round(floor, 1),
            }
            rows.append(row)
            print(row, flush=True)
        del model
        torch.cuda.empty_cache()
    save("cuda_prefill", rows, enabled=not arguments.no_save, device=device_name())


if __name__ == "__main__":
    main()
