"""What one adapter adds to a captured decode step: five shapes of models, three ranks, three batch sizes, one GPU.

    python benchmarks/bench_cuda_shapes.py [--shapes 0.1B 1B 7B 13B 70B/4] [--ranks 8 16 64] [--batches 1 8 64]

Random bfloat16 weights, adapters on all linear layers, all rows one adapter, or each row its own of eight that are
loaded; context 512. ``70B/4`` is one rank's share of Llama-2-70B cut four ways, without the sums over ranks, and only
with rank 8. Milliseconds a step are the median of graph replays; ``floor_ms`` is the bytes that the step must read at
the bandwidth measured in the same run, ``of_floor`` how much of the step that explains. Each configuration's tokens are
compared between the replayed graph and the same step run kernel by kernel.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch
from bench_cuda_decode import Model, Shape, bandwidth, measure
from common import save

SHAPES = {
    "0.1B": Shape(hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=49152, layers=30),
    "1B": Shape(hidden=2048, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocabulary=128256, layers=16),
    "7B": Shape(),
    "13B": Shape(hidden=5120, heads=40, kv_heads=40, head_dim=128, ffn=13824, vocabulary=32000, layers=40),
    "70B/4": Shape(hidden=8192, heads=16, kv_heads=2, head_dim=128, ffn=7168, vocabulary=8000, layers=80),
}
"""SmolLM2-135M, Llama-3.2-1B, Mistral-7B, Llama-2-13B, a quarter of Llama-2-70B."""
CUT = "70B/4"
SLOTS = 8
CONTEXT = 512


def same_tokens(model: Model, rows: int, slots: Sequence[int] | None) -> bool:
    """Whether a replayed step chooses the tokens of the step that is run kernel by kernel."""
    from polyaccel.backend import GraphKey
    from polyaccel.engine.graphs import rank_bucket

    named = list(slots) if slots else None
    eager = model(model.step(rows, named)).ids.clone()
    key = GraphKey(rows=rows, rank_rows=rank_bucket(model.store.graph_rank_rows(named or (), rows)))
    graph = model.backend.capture(key, model, model.step(rows, named))
    replayed = graph.replay(model.step(rows, named)).ids.clone()
    torch.cuda.synchronize()
    graph.close()
    return torch.equal(eager, replayed)


def rows_of(name: str, speed: float, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Every batch size and rank of one shape."""
    shape = SHAPES[name]
    ranks = [rank for rank in arguments.ranks if name != CUT or rank == min(arguments.ranks)]
    most = max(arguments.batches)
    model = Model(shape, rank_rows=SLOTS * max(ranks), slots=SLOTS, rows=most, context=CONTEXT)
    weights = sum(w.nbytes for site, w in model.weights.items() if site != "embedding")
    per_rank = sum((w.spec.k * len(w.spec.slices) + w.spec.n) * 2 for w in model.weights.values() if w.spec.rank_rows)
    keys = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 * (CONTEXT + 1)
    rows: list[dict[str, object]] = []

    def row(batch: int, rank: int, adapters: str, slots: list[int] | None, base: float | None) -> float:
        step = measure(model, batch, slots, arguments.repeats)
        if not same_tokens(model, batch, slots):
            raise SystemExit(f"{name}, batch {batch}, rank {rank}, {adapters}: the graph's tokens are others")
        floor = (weights + batch * keys + len(slots or ()) * rank * per_rank) / speed * 1e3
        found: dict[str, object] = {"shape": name, "batch": batch, "rank": rank, "adapters": adapters}
        found |= {"ms": round(step, 4), "floor_ms": round(floor, 4), "of_floor": round(floor / step, 3)}
        if base is not None:
            found |= {"added_ms": round(step - base, 4), "added": round((step - base) / base, 4)}
        rows.append(found)
        print(found, flush=True)
        return step

    bases = {batch: row(batch, 0, "none", None, None) for batch in arguments.batches}
    for rank in ranks:
        model._packed = None
        for slot in range(SLOTS):
            model.load_adapter(slot, rank)
        for batch, base in bases.items():
            row(batch, rank, "all rows one", [0], base)
            if batch > 1:
                row(batch, rank, "eight in turn", list(range(SLOTS)), base)
    model.backend.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    speed, rows = bandwidth(), []
    print(f"{torch.cuda.get_device_name()}  {speed / 1e12:.2f} TB/s", flush=True)
    for name in arguments.shapes:
        rows += rows_of(name, speed, arguments)
        gc.collect()
        torch.cuda.empty_cache()
    save("cuda_shapes", rows, enabled=not arguments.no_save, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
