"""What one adapter adds to a captured decode step: five shapes of models, three ranks, three batch sizes, one GPU.

    python benchmarks/bench_cuda_shapes.py [--shapes 0.1B 1B 7B 13B 70B/4] [--ranks 8 16 64] [--batches 1 8 64]
                                           [--vllm FOLDER]

Random bfloat16 weights, adapters on all linear layers, all rows one adapter, or each row its own of eight that are
loaded; context 512. ``70B/4`` is one rank's share of Llama-2-70B cut four ways, without the sums over ranks, and only
with the smallest rank. What is compared with what, checked against float64 before, and timed in turns, is that of
``bench_cuda_peers.py``'s decode: ``polyaccel`` are the backend's stations, ``cublas`` the same step with its products
by cuBLAS, ``vllm`` that with vLLM's kernels for adapters (``FOLDER``: see ``vllm_lora.py``). ``floor_ms`` is the bytes
that the step must read at the bandwidth measured in the same run, ``of_floor`` how much of the step that explains. Each
shape has a results file of its own, written when it is done.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from common import save
from cuda_model import Model, Shape
from sides import VLLM, Sides
from turns import bandwidth, device_name
from vllm_lora import VllmLora, load

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


def rows_of(name: str, lora: VllmLora | None, speed: float, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Every batch size and rank of one shape."""
    shape = SHAPES[name]
    ranks = [rank for rank in arguments.ranks if name != CUT or rank == min(arguments.ranks)]
    most = max(arguments.batches)
    model = Model(shape, rank_rows=SLOTS * max(ranks), slots=SLOTS, rows=most, context=CONTEXT)
    rows: list[dict[str, object]] = []
    for rank in ranks:
        sides = Sides(model, lora, rank=rank)
        for batch in arguments.batches:
            mixes = {"all rows one": [0] * batch, "eight in turn": [i % SLOTS for i in range(batch)]}
            if batch == 1:
                mixes = {"one": [0]}
            rows += [{"shape": name, **row} for row in sides.decode(batch, mixes, arguments.repeats, speed)]
        sides.close()
    model.backend.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--vllm", type=Path, help="folder that holds vllm/lora/ops/triton_ops")
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    arguments = parser.parse_args()
    speed, lora = bandwidth(), load(arguments.vllm)
    print(f"{device_name()}  {speed / 1e12:.2f} TB/s", flush=True)
    peer: dict[str, object] = {"kernels": VLLM, "version": lora.version if lora else "not installed"}
    for name in arguments.shapes:
        rows = [peer, *rows_of(name, lora, speed, arguments)]
        file = f"cuda_shapes_{name.replace('/', '_')}"
        save(file, rows, enabled=not arguments.no_save, device=device_name())
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
