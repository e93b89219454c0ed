"""The dense feed-forward half of a decoder layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device
from polyaccel.backend.plan import Plan, Site, SiteRequest
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel.backend.weight import Slice, Weight, WeightSpec
from polyaccel.lora.target import AdapterTarget
from polyaccel.models.block import FeedForward, HiddenStates, as_pair
from polyaccel.models.loading import Source, VectorSource
from polyaccel.models.shard import ModelShard
from polyaccel.models.sources import linear_sources, row_parallel_sources
from polyaccel.parallel.cut import Rows


class GatedMLP(FeedForward):
    """``down(act(gate(x)) * up(x))``, cut by the intermediate dimension, and the norm after it."""

    def __init__(self, shard: ModelShard, device: Device, *, layer: int, next_norm: str) -> None:
        super().__init__(shard, device)
        config, size = shard.config, shard.intermediate.size
        self._layer, self._next_norm_name = layer, next_norm
        self._module = f"model.layers.{layer}.mlp"
        self._gate_up_name, self._down_name = f"layers.{layer}.gate_up", f"layers.{layer}.down"
        slices = (Slice(name="gate", n=size), Slice(name="up", n=size))
        self._gate_up_spec = shard.spec(self._gate_up_name, slices, config.hidden_size, bias=config.mlp_bias)
        self._down_spec = shard.spec(
            self._down_name, (Slice(name="down", n=config.hidden_size),), size, bias=config.mlp_bias and shard.rank == 0
        )
        self._act, self._eps = config.hidden_act, config.norm_eps
        self._gate_up: Weight
        self._down: Weight
        self._next_norm: torch.Tensor
        self._comm: Communicator
        self._gate_up_site: Site
        self._down_site: Site

    def requests(self) -> list[SiteRequest]:
        return [
            self.shard.linear_request("gate_up_act", self._gate_up_spec, act=self._act),
            self.shard.linear_request("row_parallel_add_norm", self._down_spec, bias=self.shard.config.mlp_bias),
        ]

    def specs(self) -> list[WeightSpec]:
        return [self._gate_up_spec, self._down_spec]

    def sources(self, names: Collection[str]) -> list[Source]:
        config, rows = self.shard.config, self.shard.intermediate.rows
        shape = (config.intermediate_size, config.hidden_size)
        found: list[Source] = []
        for index, leaf in enumerate(("gate_proj", "up_proj")):
            found += linear_sources(f"{self._module}.{leaf}", self._gate_up_name, index, shape, rows, config.mlp_bias)
        down = f"{self._module}.down_proj"
        return found + row_parallel_sources(self.shard, down, self._down_name, shape[::-1], rows, config.mlp_bias)

    def vectors(self) -> list[VectorSource]:
        return [VectorSource(name=self._next_norm_name, size=self.shard.config.hidden_size)]

    def targets(self) -> list[AdapterTarget]:
        config, rows = self.shard.config, self.shard.intermediate.rows
        hidden = Rows.whole(config.hidden_size)
        targets = [
            AdapterTarget(
                module=f"{self._module}.{leaf}",
                site=self._gate_up_name,
                slice=index,
                in_features=config.hidden_size,
                out_features=config.intermediate_size,
                out_rows=rows,
                in_cols=hidden,
                padded_rows=self.shard.intermediate.size,
                layer=self._layer,
            )
            for index, leaf in enumerate(("gate_proj", "up_proj"))
        ]
        down = AdapterTarget(
            module=f"{self._module}.down_proj",
            site=self._down_name,
            slice=0,
            in_features=config.intermediate_size,
            out_features=config.hidden_size,
            out_rows=hidden,
            in_cols=rows,
            padded_cols=self.shard.intermediate.size,
            layer=self._layer,
        )
        return [*targets, down]

    def attach(self, weights: Mapping[str, Weight], vectors: Mapping[str, torch.Tensor], rope: RopeTable) -> None:
        self._gate_up, self._down = weights[self._gate_up_name], weights[self._down_name]
        self._next_norm = vectors[self._next_norm_name]

    def bind(self, plan: Plan, comm: Communicator) -> None:
        self._comm = comm
        self._gate_up_site, self._down_site = plan[self._gate_up_name], plan[self._down_name]

    def forward(self, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        gated = self._gate_up_site[step](x, self._gate_up, step, self._act)
        return as_pair(self._down_site[step](gated, self._down, step, self._comm, residual, self._next_norm, self._eps))
