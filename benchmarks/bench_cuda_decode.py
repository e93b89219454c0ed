"""One decode step of a Llama-shaped model on a GPU, captured as a graph, with and without adapters.

    python benchmarks/bench_cuda_decode.py [--layers 32] [--batches 1 32 64] [--rank 32] [--context 512]

Random weights; adapters on all linear layers. Milliseconds a step are the median of replays, which the mixes of
adapters take in turn, with the L2 cache as the step leaves it. ``floor_ms`` is the bytes that a step must read
(weights, keys, values, and the adapters named) at the bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse

from common import save
from cuda_model import Model, Shape
from turns import Decode, bandwidth, device_name, in_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--loaded", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=544)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    shape, rank = Shape(layers=arguments.layers), arguments.rank
    most = max(*arguments.batches, *arguments.loaded)
    model = Model(shape, rank_rows=most * rank, slots=most, rows=max(arguments.batches), context=arguments.context)
    for slot in range(most):
        model.load_adapter(slot, rank)
    speed = bandwidth()
    weight_bytes = sum(w.nbytes for site, w in model.weights.items() if site != "embedding")
    kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 * (arguments.context + 1)
    adapter_bytes = sum(
        rank * (w.spec.k * len(w.spec.slices) + w.spec.n) * 2 for w in model.weights.values() if w.spec.rank_rows
    )
    print(f"{device_name()}  {speed / 1e12:.2f} TB/s  weights {weight_bytes / 1e9:.2f} GB", flush=True)
    rows = []
    for batch in arguments.batches:
        floor = (weight_bytes + batch * kv_bytes) / speed * 1e3
        cases = {f"one of {n} loaded": [n - 1] for n in arguments.loaded}
        if batch > 1:
            cases = {"all rows one": [0], "each row its own": list(range(batch))}
        forms = {name: Decode(model, batch, slots) for name, slots in {"none": None, **cases}.items()}
        times = in_turns(forms, arguments.repeats)
        for form in forms.values():
            form.close()
        base = times["none"]
        print(f"batch {batch:3}  base {base:6.2f} ms  floor {floor:5.2f}  {batch / base * 1e3:7.0f} tok/s", flush=True)
        row: dict[str, object] = {"batch": batch, "base_ms": base, "floor_ms": floor}
        for name, slots in cases.items():
            added = times[name] - base
            least = len(slots) * adapter_bytes / speed * 1e3
            print(
                f"           + rank {rank}, {name:18} {added:6.3f} ms ({added / base:5.1%})  floor {least:.3f}",
                flush=True,
            )
            row[name] = added
        rows.append(row)
    save("cuda_decode", rows, enabled=not arguments.no_save, device=device_name())


if __name__ == "__main__":
    main()
