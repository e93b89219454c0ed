"""One decode step of a Llama-shaped model on a GPU, captured as a graph, with and without adapters.

    python benchmarks/bench_cuda_decode.py [--layers 32] [--batches 1 32 64] [--rank 32] [--context 512]

Random weights; adapters on all linear layers. Milliseconds a step are the median of replays with the L2 cache as the
step leaves it. ``floor_ms`` is the bytes that a step must read (weights, keys, values, and the adapters named) at the
bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from common import save

from polyaccel.backend import (
    DeviceState,
    GraphKey,
    KVSpec,
    RopeTable,
    SampleOutput,
    SamplingSpec,
    SingleRank,
    Slice,
    SlotRange,
    Step,
    StepInput,
    TokenClass,
    Weight,
    WeightSpec,
)
from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry
from polyaccel.backend.step import AdapterRows
from polyaccel.engine.graphs import rank_bucket
from polyaccel_cuda.backend import CudaBackend

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 14336
    vocabulary: int = 32000
    layers: int = 32


class Model:
    """The stations of a model, one after the other."""

    def __init__(self, shape: Shape, *, rank_rows: int, slots: int, rows: int, context: int) -> None:
        self.shape, self.backend = shape, CudaBackend()
        self.device = self.backend.devices()[0]
        self.dtype = torch.bfloat16
        self._packed: torch.Tensor | None = None
        torch.manual_seed(0)
        self.weights: dict[str, Weight] = {}
        heads, dim, kv = shape.heads, shape.head_dim, shape.kv_heads
        sites = {
            "qkv": ((heads * dim, kv * dim, kv * dim), shape.hidden),
            "o": ((shape.hidden,), heads * dim),
            "gate_up": ((shape.ffn, shape.ffn), shape.hidden),
            "down": ((shape.hidden,), shape.ffn),
        }
        for layer in range(shape.layers):
            for name, (widths, k) in sites.items():
                self._weight(f"{layer}.{name}", widths, k, rank_rows)
        self._weight("embedding", (shape.vocabulary,), shape.hidden, 0, lookup=True)
        self._weight("lm_head", (shape.vocabulary,), shape.hidden, 0)
        self.norm = torch.ones(shape.hidden, dtype=self.dtype, device="cuda")
        self.store = self.backend.allocate_adapters(
            {s: w for s, w in self.weights.items() if w.spec.rank_rows},
            rank_rows=rank_rows,
            slots=slots,
            device=self.device,
        )
        block = self.backend.kv_block_size()
        self.blocks = -(-(context + 1) // block)
        spec = KVSpec(
            layers=shape.layers,
            kv_heads=kv,
            head_dim=dim,
            dtype=self.dtype,
            blocks=rows * self.blocks,
            block_size=block,
        )
        self.kv = self.backend.allocate_kv(spec, self.device)
        self.kv.keys.normal_()  # type: ignore[attr-defined]
        self.kv.values.normal_()  # type: ignore[attr-defined]
        self.sampling = self.backend.allocate_sampling(
            SamplingSpec(request_slots=rows, vocabulary=shape.vocabulary), self.device
        )
        angle = torch.arange(context + 1)[:, None] / 10000 ** (torch.arange(dim // 2) / (dim // 2))
        self.rope = RopeTable(cos=angle.cos().cuda(), sin=angle.sin().cuda(), rotary_dim=dim)
        self.state = DeviceState(kv=self.kv, adapters=self.store, sampling=self.sampling)
        self.context = context
        self.operators = {name: entries[0].fn for name, entries in self.backend.table().items()}

    def _weight(self, site: str, widths: tuple[int, ...], k: int, rank_rows: int, *, lookup: bool = False) -> None:
        slices = tuple(Slice(name=str(i), n=n) for i, n in enumerate(widths))
        spec = WeightSpec(site=site, slices=slices, k=k, dtype=self.dtype, rank_rows=rank_rows, lookup=lookup)
        weight = self.backend.allocate_weight(spec, self.device)
        weight.tensor.normal_(std=k**-0.5)  # type: ignore[attr-defined]
        weight.seal()
        self.weights[site] = weight

    def load_adapter(self, slot: int, rank: int) -> None:
        """The same random adapter in every slot: what is read differs, what is measured does not."""
        entries, offset = [], 0
        for site, weight in self.weights.items():
            if not weight.spec.rank_rows:
                continue
            for i, part in enumerate(weight.spec.slices):
                k, n = weight.spec.k, part.n
                entries.append(
                    PackedEntry(
                        site=site,
                        slice=i,
                        expert=None,
                        kind="linear",
                        rank=rank,
                        a_offset=offset,
                        a_shape=(rank, k),
                        b_offset=offset + rank * k,
                        b_shape=(n, rank),
                    )
                )
                offset += rank * (k + n)
        if self._packed is None:
            self._packed = torch.randn(offset, dtype=self.dtype) * 0.02
        packed = PackedAdapter(buffer=self._packed, entries=tuple(entries), max_rank=rank)
        self.store.write(SlotRange(slot=slot, first_rank_row=slot * rank, rank_rows=rank), packed).synchronize()

    def step(self, rows: int, slots: list[int] | None) -> Step:
        index = np.arange(rows)
        tables = (index[:, None] * self.blocks + np.arange(self.blocks)).astype(np.int32)
        size = self.backend.kv_block_size()
        last = self.context
        triples = AdapterRows()
        if slots:
            chosen = np.array([slots[i % len(slots)] for i in range(rows)], dtype=np.int32)
            triples = AdapterRows.build(index.astype(np.int32), chosen, np.ones(rows, dtype=np.float32))
        inputs = StepInput(
            token_class=TokenClass.DECODE,
            token_ids=np.full(rows, 7, dtype=np.int64),
            positions=np.full(rows, last, dtype=np.int64),
            query_starts=np.arange(rows + 1, dtype=np.int32),
            context_lengths=np.full(rows, last + 1, dtype=np.int32),
            block_tables=tables,
            kv_slots=tables[:, last // size].astype(np.int64) * size + last % size,
            request_slots=index.astype(np.int32),
            logits_rows=index.astype(np.int32),
            sample_slots=index.astype(np.int32),
            uniforms=np.zeros(rows, dtype=np.float32),
            adapters={"tokens": triples} if slots else {},
        )
        return self.backend.begin_step(inputs, self.state, self.device)

    def __call__(self, step: Step) -> SampleOutput:
        op, weights, shape, comm = self.operators, self.weights, self.shape, SingleRank()
        scale = shape.head_dim**-0.5
        residual = op["embedding"](weights["embedding"], step, 0)
        x = op["rms_norm"](residual, self.norm, EPS)
        for layer in range(shape.layers):
            q = op["qkv_rope_cache"](
                x, weights[f"{layer}.qkv"], step, self.rope, None, None, EPS, self.kv, layer, shape.head_dim
            )
            y = op["paged_attention"](q, self.kv, layer, step, scale, None)
            x, residual = op["row_parallel_add_norm"](
                y.view(len(y), -1), weights[f"{layer}.o"], step, comm, residual, self.norm, EPS
            )
            x = op["gate_up_act"](x, weights[f"{layer}.gate_up"], step)
            x, residual = op["row_parallel_add_norm"](x, weights[f"{layer}.down"], step, comm, residual, self.norm, EPS)
        logits = op["column_linear"](op["select_rows"](x, step), weights["lm_head"], step, "logits")
        return op["sample"](logits, self.sampling, step)


def bandwidth() -> float:
    """Bytes a second that one sum over 2 GiB reads."""
    x = torch.ones(1 << 29, device="cuda")
    times = [timed(lambda: x.sum()) for _ in range(7)]
    return x.numel() * 4 / statistics.median(times) * 1e3


def timed(fn: object) -> float:
    """Milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    fn()  # type: ignore[operator]
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(model: Model, rows: int, slots: list[int] | None, repeats: int) -> float:
    step = model.step(rows, slots)
    key = GraphKey(rows=rows, rank_rows=rank_bucket(model.store.graph_rank_rows(slots or (), rows)))
    graph = model.backend.capture(key, model, step)
    times = []
    for _ in range(repeats + 5):
        step = model.step(rows, slots)
        torch.cuda.synchronize()
        times.append(timed(functools.partial(graph.replay, step)))
    graph.close()
    return statistics.median(times[5:])


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
    print(f"{torch.cuda.get_device_name()}  {speed / 1e12:.2f} TB/s  weights {weight_bytes / 1e9:.2f} GB", flush=True)
    rows = []
    for batch in arguments.batches:
        floor = (weight_bytes + batch * kv_bytes) / speed * 1e3
        base = measure(model, batch, None, arguments.repeats)
        print(f"batch {batch:3}  base {base:6.2f} ms  floor {floor:5.2f}  {batch / base * 1e3:7.0f} tok/s", flush=True)
        cases = [(f"one of {n} loaded", [n - 1]) for n in arguments.loaded]
        if batch > 1:
            cases = [("all rows one", [0]), ("each row its own", list(range(batch)))]
        row: dict[str, object] = {"batch": batch, "base_ms": base, "floor_ms": floor}
        for name, slots in cases:
            added = measure(model, batch, slots, arguments.repeats) - base
            least = len(slots) * adapter_bytes / speed * 1e3
            print(
                f"           + rank {rank}, {name:18} {added:6.3f} ms ({added / base:5.1%})  floor {least:.3f}",
                flush=True,
            )
            row[name] = added
        rows.append(row)
    save("cuda_decode", rows, enabled=not arguments.no_save, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
