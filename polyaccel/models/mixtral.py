"""Mixtral: sparse experts instead of the MLP, each expert cut by its intermediate dimension over all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device
from polyaccel.backend.plan import Plan, Site, SiteRequest
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel.backend.support import Static
from polyaccel.backend.weight import Slice, Weight, WeightSpec
from polyaccel.lora.target import AdapterTarget
from polyaccel.models.block import FeedForward, HiddenStates, as_pair, as_tensor
from polyaccel.models.decoder import DecoderModel
from polyaccel.models.loading import Source, VectorSource
from polyaccel.models.shard import ModelShard
from polyaccel.parallel.cut import Rows

# Softmax over all experts, then the best ones renormalised: equal to the router of arXiv:2401.04088, which takes the
# softmax of the best ones only.
_SCORING = "softmax_topk"


class SparseExperts(FeedForward):
    """``sum_e weight_e * down_e(act(gate_e(x)) * up_e(x))`` over each token's experts, and the norm after it."""

    def __init__(self, shard: ModelShard, device: Device, *, layer: int, next_norm: str) -> None:
        super().__init__(shard, device)
        config, size = shard.config, shard.intermediate.size
        self._layer, self._next_norm_name = layer, next_norm
        self._module = f"model.layers.{layer}.block_sparse_moe"
        self._router_name, self._experts_name = f"layers.{layer}.router", f"layers.{layer}.experts"
        self._gate_up_name, self._down_name = f"{self._experts_name}.gate_up", f"{self._experts_name}.down"
        experts, hidden = config.num_experts, config.hidden_size
        self._router_spec = shard.spec(self._router_name, (Slice(name="router", n=experts),), hidden)
        slices = (Slice(name="gate", n=size), Slice(name="up", n=size))
        self._gate_up_spec = shard.spec(self._gate_up_name, slices, hidden, experts=experts)
        self._down_spec = shard.spec(self._down_name, (Slice(name="down", n=hidden),), size, experts=experts)
        self._reduces = shard.world_size > 1
        self._router: Weight
        self._gate_up: Weight
        self._down: Weight
        self._next_norm: torch.Tensor
        self._comm: Communicator
        self._router_site: Site
        self._route_site: Site
        self._experts_site: Site
        self._reduce_site: Site
        self._norm_site: Site

    def requests(self) -> list[SiteRequest]:
        config, shard = self.shard.config, self.shard
        routing: dict[str, Static] = {"experts": config.num_experts, "top_k": config.experts_per_token}
        requests = [
            shard.linear_request("column_linear", self._router_spec, row_set="tokens"),
            shard.request(
                f"{self._router_name}.route",
                "moe_route",
                scoring=_SCORING,
                renormalise=config.norm_topk_prob,
                groups=1,
                topk_groups=1,
                scale=1.0,
                bias=False,
                **routing,
            ),
            shard.request(
                self._experts_name,
                "moe_experts",
                k=config.hidden_size,
                slices=tuple(part.n for part in self._gate_up_spec.slices),
                intermediate=self._down_spec.k,
                act=config.hidden_act,
                quantised=False,
                group_size=0,
                expert_map=False,
                **routing,
            ),
        ]
        if self._reduces:
            requests.append(shard.request(f"{self._experts_name}.all_reduce", "all_reduce"))
        return [*requests, shard.request(f"{self._experts_name}.norm", "rms_norm", residual=True)]

    def specs(self) -> list[WeightSpec]:
        return [self._router_spec, self._gate_up_spec, self._down_spec]

    def sources(self, names: Collection[str]) -> list[Source]:
        config = self.shard.config
        stacked = f"model.layers.{self._layer}.mlp"
        is_stacked = f"{stacked}.experts.gate_up_proj" in names
        shape = (config.num_experts, config.hidden_size)
        router = Source(
            name=f"{stacked if is_stacked else self._module}.gate.weight",
            shape=shape,
            site=self._router_name,
            rows=Rows.whole(shape[0]),
            cols=Rows.whole(shape[1]),
        )
        per_expert = self._stacked_sources(f"{stacked}.experts") if is_stacked else self._expert_sources()
        return [router, *per_expert]

    def vectors(self) -> list[VectorSource]:
        return [VectorSource(name=self._next_norm_name, size=self.shard.config.hidden_size)]

    def targets(self) -> list[AdapterTarget]:
        config, rows = self.shard.config, self.shard.intermediate.rows
        hidden, features = config.hidden_size, config.intermediate_size
        whole, experts = Rows.whole(hidden), Rows.whole(config.num_experts)
        targets = [self._target("gate", self._router_spec, 0, None, (config.num_experts, hidden), experts, whole)]
        for expert in range(config.num_experts):
            module = f"experts.{expert}"
            targets += [
                self._target(f"{module}.w1", self._gate_up_spec, 0, expert, (features, hidden), rows, whole),
                self._target(f"{module}.w3", self._gate_up_spec, 1, expert, (features, hidden), rows, whole),
                self._target(f"{module}.w2", self._down_spec, 0, expert, (hidden, features), whole, rows),
            ]
        return targets

    def attach(self, weights: Mapping[str, Weight], vectors: Mapping[str, torch.Tensor], rope: RopeTable) -> None:
        self._router = weights[self._router_name]
        self._gate_up, self._down = weights[self._gate_up_name], weights[self._down_name]
        self._next_norm = vectors[self._next_norm_name]

    def bind(self, plan: Plan, comm: Communicator) -> None:
        self._comm = comm
        self._router_site, self._route_site = plan[self._router_name], plan[f"{self._router_name}.route"]
        self._experts_site = plan[self._experts_name]
        if self._reduces:
            self._reduce_site = plan[f"{self._experts_name}.all_reduce"]
        self._norm_site = plan[f"{self._experts_name}.norm"]

    def forward(self, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        config = self.shard.config
        logits = self._router_site[step](x, self._router, step, "tokens")
        routed = self._route_site[step](
            logits, config.experts_per_token, _SCORING, config.norm_topk_prob, None, 1, 1, 1.0
        )
        weights, ids = cast(tuple[torch.Tensor, torch.Tensor], routed)
        y = as_tensor(
            self._experts_site[step](x, self._gate_up, self._down, ids, weights, step, config.hidden_act, None)
        )
        if self._reduces:
            y = as_tensor(self._reduce_site[step](y, self._comm))
        return as_pair(self._norm_site[step](y, self._next_norm, config.norm_eps, residual))

    def _target(
        self,
        leaf: str,
        spec: WeightSpec,
        index: int,
        expert: int | None,
        shape: tuple[int, int],
        rows: Rows,
        cols: Rows,
    ) -> AdapterTarget:
        return AdapterTarget(
            module=f"{self._module}.{leaf}",
            site=spec.site,
            slice=index,
            expert=expert,
            in_features=shape[1],
            out_features=shape[0],
            out_rows=rows,
            in_cols=cols,
            padded_rows=spec.slices[index].n,
            padded_cols=spec.k,
            layer=self._layer,
        )

    def _expert_sources(self) -> list[Source]:
        """One tensor a projection and expert, the form of the published checkpoints."""
        config, part = self.shard.config, self.shard.intermediate.rows
        hidden, whole = config.hidden_size, Rows.whole(config.hidden_size)
        found: list[Source] = []
        for expert in range(config.num_experts):
            for leaf, index in (("w1", 0), ("w3", 1), ("w2", 0)):
                is_down = leaf == "w2"
                found.append(
                    Source(
                        name=f"{self._module}.experts.{expert}.{leaf}.weight",
                        shape=(hidden, config.intermediate_size) if is_down else (config.intermediate_size, hidden),
                        site=self._down_name if is_down else self._gate_up_name,
                        slice=index,
                        rows=whole if is_down else part,
                        cols=part if is_down else whole,
                        expert=expert,
                    )
                )
        return found

    def _stacked_sources(self, module: str) -> list[Source]:
        """All experts in one tensor, gate above up, the form in which transformers 5 holds them in memory."""
        config, part = self.shard.config, self.shard.intermediate.rows
        experts, hidden, features = config.num_experts, config.hidden_size, config.intermediate_size
        whole = Rows.whole(hidden)
        up = Rows(tuple((start + features, stop + features) for start, stop in part))
        found: list[Source] = []
        for expert in range(experts):
            for index, rows in enumerate((part, up)):
                found.append(
                    Source(
                        name=f"{module}.gate_up_proj",
                        shape=(experts, 2 * features, hidden),
                        site=self._gate_up_name,
                        slice=index,
                        rows=rows,
                        cols=whole,
                        expert=expert,
                        stacked=expert,
                    )
                )
            found.append(
                Source(
                    name=f"{module}.down_proj",
                    shape=(experts, hidden, features),
                    site=self._down_name,
                    rows=whole,
                    cols=part,
                    expert=expert,
                    stacked=expert,
                )
            )
        return found


class MixtralModel(DecoderModel):
    """Mixtral: every feed-forward is a set of sparse experts."""

    def build_feed_forward(self, layer: int, device: Device, next_norm: str) -> FeedForward:
        return SparseExperts(self.shard, device, layer=layer, next_norm=next_norm)
