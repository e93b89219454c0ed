"""Attention of one decoder layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.plan import Plan, Site, SiteRequest
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel.backend.weight import Slice, Weight, WeightSpec
from polyaccel.lora.target import AdapterTarget
from polyaccel.models.block import Block, HiddenStates, as_pair, as_tensor
from polyaccel.models.loading import Source, VectorSource
from polyaccel.models.shard import ModelShard
from polyaccel.models.sources import linear_sources, row_parallel_sources
from polyaccel.parallel.cut import Rows


class Attention(Block):
    """Grouped-query attention over the paged cache, cut by heads, and the norm after it."""

    def __init__(self, shard: ModelShard, device: Device, *, layer: int, kv_layer: int) -> None:
        super().__init__(shard, device)
        config, heads = shard.config, shard.heads
        self._layer, self._kv_layer = layer, kv_layer
        self._module = f"model.layers.{layer}.self_attn"
        self._qkv_name, self._o_name = f"layers.{layer}.qkv", f"layers.{layer}.o"
        self._attention_name = f"layers.{layer}.attention"
        self._head_dim, self._eps = config.head_dim, config.norm_eps
        self._scale = config.head_dim**-0.5
        self._window = config.sliding_windows[layer]
        q, kv = heads.num_q * config.head_dim, heads.num_kv * config.head_dim
        slices = (Slice(name="q", n=q), Slice(name="k", n=kv), Slice(name="v", n=kv))
        self._qkv_spec = shard.spec(self._qkv_name, slices, config.hidden_size, bias=config.qkv_bias)
        # The bias is added once to the sum over ranks.
        self._o_spec = shard.spec(
            self._o_name, (Slice(name="o", n=config.hidden_size),), q, bias=config.o_bias and shard.rank == 0
        )
        self._qkv: Weight
        self._o: Weight
        self._post_norm: torch.Tensor
        self._q_norm: torch.Tensor | None = None
        self._k_norm: torch.Tensor | None = None
        self._rope: RopeTable
        self._kv: KVCache
        self._comm: Communicator
        self._qkv_site: Site
        self._attention_site: Site
        self._o_site: Site

    def requests(self) -> list[SiteRequest]:
        config, heads, shard = self.shard.config, self.shard.heads, self.shard
        qkv = shard.linear_request(
            "qkv_rope_cache",
            self._qkv_spec,
            heads=heads.num_q,
            kv_heads=heads.num_kv,
            head_dim=config.head_dim,
            qk_norm=config.qk_norm,
            rotary_dim=config.rope.rotary_dim,
            rope_style=config.rope.style,
        )
        attention = shard.request(
            self._attention_name,
            "paged_attention",
            heads=heads.num_q,
            kv_heads=heads.num_kv,
            head_dim=config.head_dim,
            scale=self._scale,
            window=self._window,
        )
        return [qkv, attention, shard.linear_request("row_parallel_add_norm", self._o_spec, bias=config.o_bias)]

    def specs(self) -> list[WeightSpec]:
        return [self._qkv_spec, self._o_spec]

    def sources(self, names: Collection[str]) -> list[Source]:
        config = self.shard.config
        found: list[Source] = []
        for index, (module, features, rows) in enumerate(self._projections()):
            found += linear_sources(
                module, self._qkv_name, index, (features, config.hidden_size), rows, config.qkv_bias
            )
        shape = (config.hidden_size, config.num_heads * config.head_dim)
        o = f"{self._module}.o_proj"
        return found + row_parallel_sources(self.shard, o, self._o_name, shape, self._q_rows, config.o_bias)

    def vectors(self) -> list[VectorSource]:
        config = self.shard.config
        names = [VectorSource(name=self._post_norm_name, size=config.hidden_size)]
        if config.qk_norm:
            names += [VectorSource(name=name, size=config.head_dim) for name in self._qk_norm_names]
        return names

    def targets(self) -> list[AdapterTarget]:
        hidden = self.shard.config.hidden_size
        targets = [
            AdapterTarget(
                module=module,
                site=self._qkv_name,
                slice=index,
                in_features=hidden,
                out_features=features,
                out_rows=rows,
                in_cols=Rows.whole(hidden),
                padded_rows=self._qkv_spec.slices[index].n,
                layer=self._layer,
            )
            for index, (module, features, rows) in enumerate(self._projections())
        ]
        o = AdapterTarget(
            module=f"{self._module}.o_proj",
            site=self._o_name,
            slice=0,
            in_features=self.shard.config.num_heads * self._head_dim,
            out_features=hidden,
            out_rows=Rows.whole(hidden),
            in_cols=self._q_rows,
            padded_cols=self._o_spec.k,
            layer=self._layer,
        )
        return [*targets, o]

    def attach(self, weights: Mapping[str, Weight], vectors: Mapping[str, torch.Tensor], rope: RopeTable) -> None:
        self._qkv, self._o = weights[self._qkv_name], weights[self._o_name]
        self._post_norm, self._rope = vectors[self._post_norm_name], rope
        if self.shard.config.qk_norm:
            self._q_norm, self._k_norm = (vectors[name] for name in self._qk_norm_names)

    def bind(self, plan: Plan, comm: Communicator) -> None:
        self._comm = comm
        self._qkv_site, self._o_site = plan[self._qkv_name], plan[self._o_name]
        self._attention_site = plan[self._attention_name]

    def bind_kv(self, kv: KVCache) -> None:
        self._kv = kv

    def forward(self, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        """``x, residual: [T, hidden]``; returns both after attention and the norm that follows it."""
        kv, kv_layer = self._kv, self._kv_layer
        q = self._qkv_site[step](
            x, self._qkv, step, self._rope, self._q_norm, self._k_norm, self._eps, kv, kv_layer, self._head_dim
        )
        attended = as_tensor(self._attention_site[step](q, kv, kv_layer, step, self._scale, self._window))
        return as_pair(
            self._o_site[step](attended.flatten(1), self._o, step, self._comm, residual, self._post_norm, self._eps)
        )

    @property
    def _q_rows(self) -> Rows:
        return self.shard.heads.cut.q_rows(self._head_dim)

    def _projections(self) -> list[tuple[str, int, Rows]]:
        """Module, features and this rank's rows of q, k and v."""
        config, cut = self.shard.config, self.shard.heads.cut
        kv_features, kv_rows = config.num_kv_heads * self._head_dim, cut.kv_rows(self._head_dim)
        return [
            (f"{self._module}.q_proj", config.num_heads * self._head_dim, self._q_rows),
            (f"{self._module}.k_proj", kv_features, kv_rows),
            (f"{self._module}.v_proj", kv_features, kv_rows),
        ]

    @property
    def _post_norm_name(self) -> str:
        return f"model.layers.{self._layer}.post_attention_layernorm.weight"

    @property
    def _qk_norm_names(self) -> tuple[str, str]:
        return f"{self._module}.q_norm.weight", f"{self._module}.k_norm.weight"
