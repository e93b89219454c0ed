"""Every station of a SmolLM2-135M decode or prefill step on the CPU backend, against what the machine allows.

    python benchmarks/bench_operators_cpu.py [--batches 1 8] [--contexts 192 1088] [--prefill 128 1024] [--rank 8]

Random weights of the real shapes, all thirty layers one after the other as in a step, so that caches hold no more than
they would. The median of a station over layers and repeats. ``floor_us`` is the larger of the bytes it must read at the
memory bandwidth and its multiplications at the product rate, both measured in the same run; ``of_limit`` is that floor
over the time. Each station's result is compared with its parts in plain torch first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from common import add_common_options, read_bandwidth, save

from polyaccel.backend import stations
from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.backend import Backend
from polyaccel.backend.communicator import SingleRank
from polyaccel.backend.cpu.backend import CpuBackend
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import AdapterRows, DeviceState, StepInput, TokenClass
from polyaccel.backend.table import TableBackend
from polyaccel.backend.weight import Slice, Weight, WeightSpec

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY, LAYERS = 576, 9, 3, 64, 1536, 49152, 30
EPS, SCALE = 1e-5, HEAD_DIM**-0.5
SITES = {
    "qkv": ((HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM), HIDDEN),
    "o": ((HIDDEN,), HEADS * HEAD_DIM),
    "gate_up": ((FFN, FFN), HIDDEN),
    "down": ((HIDDEN,), FFN),
}
PARTS = {
    "qkv_rope_cache": ("linear", "sgmv", "rotary_embedding", "write_kv_cache"),
    "gate_up_act": ("linear", "sgmv", "silu_and_mul"),
}


@dataclass
class Bench:
    """The model's sites on one backend."""

    backend: Backend
    dtype: torch.dtype
    layers: int
    rank: int
    adapters: int
    weights: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        device = self.backend.devices()[0]
        for layer in range(self.layers):
            for name, (widths, k) in SITES.items():
                self._add(f"{layer}.{name}", widths, k, generator)
        self._add("lm_head", (VOCABULARY,), HIDDEN, generator)
        angles = torch.outer(torch.arange(4096.0), 1e5 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=HEAD_DIM)
        self.norm = torch.rand(HIDDEN, generator=generator).to(self.dtype)
        self.comm = SingleRank()
        rows = self.rank * max(1, self.adapters)
        self.store = self.backend.allocate_adapters(self.weights, rank_rows=rows, slots=8, device=device)
        for slot in range(self.adapters):
            where = SlotRange(slot=slot, first_rank_row=slot * self.rank, rank_rows=self.rank)
            self.store.write(where, self._adapter(generator))

    def _add(self, site: str, widths: Sequence[int], k: int, generator: torch.Generator) -> None:
        slices = tuple(Slice(name=str(i), n=n) for i, n in enumerate(widths))
        spec = WeightSpec(site=site, slices=slices, k=k, dtype=self.dtype, rank_rows=0 if site == "lm_head" else 1)
        weight = self.weights[site] = self.backend.allocate_weight(spec, self.backend.devices()[0])
        for i, n in enumerate(widths):
            weight.write(i, torch.randn(n, k, generator=generator) * k**-0.5)
        weight.seal()

    def _adapter(self, generator: torch.Generator) -> PackedAdapter:
        entries, parts, offset = [], [], 0
        for site, weight in self.weights.items():
            for i, part in enumerate(weight.spec.slices if weight.spec.rank_rows else ()):
                a, b = (self.rank, weight.spec.k), (part.n, self.rank)
                b_offset = offset + a[0] * a[1]
                entries.append(
                    PackedEntry(
                        site=site,
                        slice=i,
                        expert=None,
                        kind="linear",
                        rank=self.rank,
                        a_offset=offset,
                        a_shape=a,
                        b_offset=b_offset,
                        b_shape=b,
                    )
                )
                parts.append(torch.randn(a[0] * a[1] + b[0] * b[1], generator=generator) * 0.02)
                offset = b_offset + b[0] * b[1]
        return PackedAdapter(buffer=torch.cat(parts).to(self.dtype), entries=tuple(entries), max_rank=self.rank)

    def cache(self, inputs: StepInput) -> KVCache:
        """A cache in which every sequence has the same random keys and values."""
        size, context = self.backend.kv_block_size(), int(inputs.context_lengths[0])
        spec = KVSpec(
            layers=self.layers,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=self.dtype,
            blocks=inputs.block_tables.size,
            block_size=size,
        )
        cache = self.backend.allocate_kv(spec, self.backend.devices()[0])
        where = np.arange(context)
        slots = inputs.block_tables[:, where // size].astype(np.int64) * size + where % size
        generator = torch.Generator().manual_seed(1)
        content = torch.randn(context, KV_HEADS, HEAD_DIM, generator=generator).to(self.dtype)
        content = content.repeat(inputs.sequences, 1, 1)
        for layer in range(self.layers):
            cache.write(layer, torch.from_numpy(slots.reshape(-1)), content, content)
        return cache

    def station(self, name: str) -> Callable[..., object]:
        """Native where the backend has it, otherwise the contract's body over composites."""
        table = self.backend.table()
        if name in table:
            return table[name][0].fn
        if name in stations.STATIONS:
            operators = {part: self.station(part) for part in PARTS.get(name, ("linear", "sgmv", "rms_norm"))}
            if name == "row_parallel_add_norm":
                operators["row_parallel_linear"] = stations.build("row_parallel_linear", operators)
            return stations.build(name, operators)
        return self.backend.composites()[name]


def step_input(sequences: int, queries: int, context: int, block_size: int, adapters: int) -> StepInput:
    """Sequences of one length. Blocks after the first prompt's are handed out in turn, as in a running batch."""
    blocks, tokens = -(-context // block_size), sequences * queries
    tables = np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks)
    where = np.arange(context - queries, context)
    rows = np.arange(tokens, dtype=np.int32)
    triples = AdapterRows()
    if adapters:
        triples = AdapterRows.build(rows, rows // queries % adapters, np.ones(tokens, dtype=np.float32))
    return StepInput(
        token_class=TokenClass.DECODE if queries == 1 else TokenClass.MIXED,
        token_ids=np.zeros(tokens, dtype=np.int64),
        positions=np.tile(where, sequences),
        query_starts=(np.arange(sequences + 1) * queries).astype(np.int32),
        context_lengths=np.full(sequences, context, dtype=np.int32),
        block_tables=tables,
        kv_slots=(tables[:, where // block_size].astype(np.int64) * block_size + where % block_size).reshape(-1),
        request_slots=np.arange(sequences, dtype=np.int32),
        logits_rows=(np.arange(1, sequences + 1) * queries - 1).astype(np.int32),
        sample_slots=np.arange(sequences, dtype=np.int32),
        uniforms=np.zeros(sequences, dtype=np.float32),
        adapters={"tokens": triples},
    )


class Pass:
    """One pass through all layers, station by station."""

    def __init__(self, bench: Bench, inputs: StepInput, cache: KVCache) -> None:
        self.bench, self.inputs, self.cache = bench, inputs, cache
        names = ("qkv_rope_cache", "paged_attention", "row_parallel_add_norm", "gate_up_act", "column_linear")
        self._stations = {name: bench.station(name) for name in names}
        self.seconds: dict[str, list[float]] = {}

    def run(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last layer's results by station."""
        bench, comm = self.bench, self.bench.comm
        step = bench.backend.begin_step(
            self.inputs, DeviceState(kv=self.cache, adapters=bench.store), bench.backend.devices()[0]
        )
        residual, results = x, {}
        for layer in range(bench.layers):
            site = {name: bench.weights[f"{layer}.{name}"] for name in SITES}
            arguments = (bench.rope, None, None, EPS, self.cache, layer, HEAD_DIM)
            q = self._timed("qkv_rope_cache", "qkv_rope_cache", x, site["qkv"], step, *arguments)
            attended = self._timed("paged_attention", "paged_attention", q, self.cache, layer, step, SCALE, None)
            rest = (step, comm, residual, bench.norm, EPS)
            add_norm, flat = "row_parallel_add_norm", attended.flatten(1)
            x, residual = self._timed(f"{add_norm} (o)", add_norm, flat, site["o"], *rest)
            gated = self._timed("gate_up_act", "gate_up_act", x, site["gate_up"], step, "silu")
            rest = (step, comm, residual, bench.norm, EPS)
            x, residual = self._timed(f"{add_norm} (down)", add_norm, gated, site["down"], *rest)
            results = {"q": q, "attended": attended, "gated": gated, "x": x, "residual": residual}
        rows = x[torch.from_numpy(self.inputs.logits_rows).long()]
        results["logits"] = self._timed(
            "column_linear (lm_head)", "column_linear", rows, bench.weights["lm_head"], step, "logits"
        )
        return results

    def _timed(self, label: str, station: str, *arguments: object) -> object:
        begun = time.perf_counter()
        result = self._stations[station](*arguments)
        self.seconds.setdefault(label, []).append(time.perf_counter() - begun)
        return result


def floors(inputs: StepInput, dtype: torch.dtype, adapters: int, rank: int) -> dict[str, tuple[float, float]]:
    """Bytes that must be read, and multiplications times two, of each station in one layer."""
    tokens, size = inputs.tokens, dtype.itemsize
    queries, context = tokens // inputs.sequences, int(inputs.context_lengths[0])
    seen = queries * context - queries * (queries - 1) / 2
    found = {}
    for label, name in (
        ("qkv_rope_cache", "qkv"),
        ("row_parallel_add_norm (o)", "o"),
        ("gate_up_act", "gate_up"),
        ("row_parallel_add_norm (down)", "down"),
    ):
        widths, k = SITES[name]
        lora = rank * (len(widths) * k + sum(widths))
        read = sum(widths) * k + min(adapters, inputs.sequences) * lora
        found[label] = (size * read, 2.0 * tokens * (sum(widths) * k + (lora if adapters else 0)))
    keys = 2 * inputs.sequences * context * KV_HEADS * HEAD_DIM
    found["paged_attention"] = (size * keys, 4.0 * inputs.sequences * seen * HEADS * HEAD_DIM)
    found["column_linear (lm_head)"] = (size * VOCABULARY * HIDDEN, 2.0 * inputs.sequences * VOCABULARY * HIDDEN)
    return found


def product_rate(dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large packed product, best of five."""
    backend = CpuBackend()
    spec = WeightSpec(site="w", slices=(Slice(name="w", n=2048),), k=2048, dtype=dtype)
    weight = backend.allocate_weight(spec, backend.devices()[0])
    weight.seal()
    linear, x = backend.table()["linear"][0].fn, torch.randn(1024, 2048).to(dtype)
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        linear(x, weight)
        best = min(best, time.perf_counter() - begun)
    return 2 * 1024 * 2048 * 2048 / best


def check(dtype: torch.dtype, adapters: int, rank: int, queries: int) -> None:
    """Two layers on the CPU backend and on composites, the same weights.

    Raises:
        SystemExit: a result differs by more than rounding.
    """
    results: list[dict[str, torch.Tensor]] = []
    for backend in (CpuBackend(), TableBackend("cpu", {})):
        bench = Bench(backend, dtype, 2, rank, adapters)
        inputs = step_input(4, queries, 70, backend.kv_block_size(), adapters)
        cache = bench.cache(inputs)
        x = torch.randn(inputs.tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
        results.append(Pass(bench, inputs, cache).run(x))
    for name, expected in results[1].items():
        worst = float((results[0][name].float() - expected.float()).abs().max())
        bound = (500 if dtype == torch.float32 else 20) * torch.finfo(dtype).eps * float(expected.float().abs().max())
        if not worst <= bound:
            raise SystemExit(f"{name}: differs from plain torch by {worst:.3g}, allowed is {bound:.3g}")


def measure(
    bench: Bench, sequences: int, queries: int, context: int, repeats: int, bandwidth: float, rate: float
) -> list[dict[str, object]]:
    block_size = bench.backend.kv_block_size()
    inputs = step_input(sequences, queries, context, block_size, bench.adapters)
    walk = Pass(bench, inputs, bench.cache(inputs))
    x = torch.randn(inputs.tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).to(bench.dtype)
    walk.run(x)
    walk.seconds.clear()
    for _ in range(repeats):
        walk.run(x)
    rows: list[dict[str, object]] = []
    limits = floors(inputs, bench.dtype, bench.adapters, bench.rank)
    for label, seconds in walk.seconds.items():
        read, products = limits[label]
        floor, median = max(read / bandwidth, products / rate), statistics.median(seconds)
        rows.append(
            {
                "station": label,
                "dtype": str(bench.dtype).removeprefix("torch."),
                "sequences": sequences,
                "queries": queries,
                "context": context,
                "adapters": bench.adapters,
                "rank": bench.rank if bench.adapters else 0,
                "median_us": round(median * 1e6, 1),
                "floor_us": round(floor * 1e6, 1),
                "of_limit": round(floor / median, 3),
                "bound_by": "bandwidth" if read / bandwidth >= products / rate else "products",
                "gb_per_s": round(read / median / 1e9, 1),
                "gflop_per_s": round(products / median / 1e9, 1),
                "repeats": repeats * (bench.layers if label in PER_LAYER else 1),
            }
        )
    return rows


PER_LAYER = (
    "qkv_rope_cache",
    "paged_attention",
    "row_parallel_add_norm (o)",
    "gate_up_act",
    "row_parallel_add_norm (down)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[192, 1088])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    add_common_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for name in arguments.dtypes:
            dtype = getattr(torch, name)
            bandwidth, rate = read_bandwidth(), product_rate(dtype)
            for adapters in (0, 8):
                for queries in (1, 9):
                    check(dtype, adapters, arguments.rank, queries)
                bench = Bench(CpuBackend(), dtype, LAYERS, arguments.rank, adapters)
                for batch in arguments.batches if not adapters else [b for b in arguments.batches if b >= 8]:
                    for context in arguments.contexts:
                        rows += measure(bench, batch, 1, context, arguments.repeats, bandwidth, rate)
                for prompt in arguments.prefill if not adapters else ():
                    rows += measure(bench, 1, prompt, prompt, arguments.repeats, bandwidth, rate)
            limits = {"bandwidth_gb_per_s": round(bandwidth / 1e9, 1), "product_gflop_per_s": round(rate / 1e9, 1)}
            rows = [row | limits if row["dtype"] == name else row for row in rows]
    save("operators_cpu", rows, enabled=not arguments.no_save)


if __name__ == "__main__":
    main()
