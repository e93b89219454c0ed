"""A Llama-shaped model with random weights on a GPU: the backend's stations in order, without an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from polyaccel.backend import (
    DeviceState,
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


class Stations(Protocol):
    """What a step does in a layer, but for attention, and after the last."""

    def qkv(self, x: torch.Tensor, layer: int, step: Step) -> torch.Tensor: ...

    def add_norm(
        self, x: torch.Tensor, site: str, step: Step, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def gate_up(self, x: torch.Tensor, layer: int, step: Step) -> torch.Tensor: ...

    def head(self, x: torch.Tensor, step: Step) -> torch.Tensor: ...


class Model:
    """The stations of a model, one after the other."""

    def __init__(
        self,
        shape: Shape,
        *,
        rank_rows: int,
        slots: int,
        rows: int,
        context: int,
        backend: CudaBackend | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.shape, self.backend, self.dtype = shape, backend or CudaBackend(), dtype
        self.device = self.backend.devices()[0]
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
        self.norm = torch.ones(shape.hidden, dtype=self.dtype, device=self.device.torch_device)
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
        angle = angle.to(self.device.torch_device)
        self.rope = RopeTable(cos=angle.cos(), sin=angle.sin(), rotary_dim=dim)
        self.state = DeviceState(kv=self.kv, adapters=self.store, sampling=self.sampling)
        self.context = context
        self.operators: dict[str, Any] = {name: entries[0].fn for name, entries in self.backend.table().items()}

    def _weight(self, site: str, widths: tuple[int, ...], k: int, rank_rows: int, *, lookup: bool = False) -> None:
        slices = tuple(Slice(name=str(i), n=n) for i, n in enumerate(widths))
        spec = WeightSpec(site=site, slices=slices, k=k, dtype=self.dtype, rank_rows=rank_rows, lookup=lookup)
        weight = self.backend.allocate_weight(spec, self.device)
        weight.tensor.normal_(std=k**-0.5)  # type: ignore[attr-defined]
        weight.seal()
        self.weights[site] = weight

    def adapter(self, slot: int, rank: int) -> PackedAdapter:
        """The random adapter of a slot, on the device; it adds a quarter of what the weights give."""
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
        device = self.device.torch_device
        draw = torch.Generator(device).manual_seed(slot)
        buffer = torch.randn(offset, dtype=self.dtype, device=device, generator=draw)
        for entry in entries:
            buffer[entry.a_offset : entry.b_offset] *= entry.a_shape[1] ** -0.5
            buffer[entry.b_offset : entry.b_offset + entry.b_shape[0] * rank] *= rank**-0.5 / 4
        return PackedAdapter(buffer=buffer, entries=tuple(entries), max_rank=rank)

    def load_adapter(self, slot: int, rank: int) -> None:
        packed = self.adapter(slot, rank)
        packed = replace(packed, buffer=packed.buffer.cpu())
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

    def qkv(self, x: torch.Tensor, layer: int, step: Step) -> torch.Tensor:
        place = (self.kv, layer, self.shape.head_dim)
        return self.operators["qkv_rope_cache"](
            x, self.weights[f"{layer}.qkv"], step, self.rope, None, None, EPS, *place
        )

    def add_norm(
        self, x: torch.Tensor, site: str, step: Step, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.operators["row_parallel_add_norm"](
            x, self.weights[site], step, SingleRank(), residual, self.norm, EPS
        )

    def gate_up(self, x: torch.Tensor, layer: int, step: Step) -> torch.Tensor:
        return self.operators["gate_up_act"](x, self.weights[f"{layer}.gate_up"], step)

    def head(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        return self.operators["column_linear"](x, self.weights["lm_head"], step, "logits")

    def __call__(self, step: Step, stations: Stations | None = None) -> SampleOutput:
        """A whole step; ``stations``: in place of the model's own."""
        op, shape, own = self.operators, self.shape, stations or self
        scale = shape.head_dim**-0.5
        residual = op["embedding"](self.weights["embedding"], step, 0)
        x = op["rms_norm"](residual, self.norm, EPS)
        for layer in range(shape.layers):
            q = own.qkv(x, layer, step)
            y = op["paged_attention"](q, self.kv, layer, step, scale, None)
            x, residual = own.add_norm(y.view(len(y), -1), f"{layer}.o", step, residual)
            x = own.gate_up(x, layer, step)
            x, residual = own.add_norm(x, f"{layer}.down", step, residual)
        return op["sample"](own.head(op["select_rows"](x, step), step), self.sampling, step)
