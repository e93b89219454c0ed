"""Token ids to hidden states."""

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
from polyaccel.models.block import Block, HiddenStates, as_tensor
from polyaccel.models.loading import Source, VectorSource
from polyaccel.models.shard import ModelShard
from polyaccel.models.sources import embedding_source
from polyaccel.parallel.cut import Rows

EMBEDDING = "embedding"
EMBEDDING_MODULE = "model.embed_tokens"


class Embedding(Block):
    """Token ids to hidden states, cut by vocabulary, and the first layer's input norm."""

    def __init__(self, shard: ModelShard, device: Device, *, norm: str) -> None:
        super().__init__(shard, device)
        vocabulary, hidden = shard.vocabulary, shard.config.hidden_size
        self._spec = shard.spec(EMBEDDING, (Slice(name="embedding", n=vocabulary.size),), hidden, lookup=True)
        self._norm_name = norm
        self._vocabulary_start = shard.rank * vocabulary.size
        self._eps = shard.config.norm_eps
        self._reduces = shard.world_size > 1
        self._weight: Weight
        self._norm: torch.Tensor
        self._embedding_site: Site
        self._reduce_site: Site
        self._norm_site: Site
        self._comm: Communicator

    def requests(self) -> list[SiteRequest]:
        shard = self.shard
        requests = [shard.request(EMBEDDING, "embedding", vocabulary=self._spec.n, quantised=False)]
        if self._reduces:
            requests.append(shard.request(f"{EMBEDDING}.all_reduce", "all_reduce"))
        requests.append(shard.request(f"{EMBEDDING}.norm", "rms_norm", residual=False))
        return requests

    def specs(self) -> list[WeightSpec]:
        return [self._spec]

    def sources(self, names: Collection[str]) -> list[Source]:
        return [embedding_source(self.shard, f"{EMBEDDING_MODULE}.weight", EMBEDDING)]

    def vectors(self) -> list[VectorSource]:
        return [VectorSource(name=self._norm_name, size=self.shard.config.hidden_size)]

    def targets(self) -> list[AdapterTarget]:
        config = self.shard.config
        target = AdapterTarget(
            module=EMBEDDING_MODULE,
            site=EMBEDDING,
            slice=0,
            kind="embedding",
            in_features=config.vocab_size,
            out_features=config.hidden_size,
            out_rows=Rows.whole(config.hidden_size),
            in_cols=self.shard.vocabulary.rows,
            padded_cols=self.shard.vocabulary.size,
        )
        return [target]

    def attach(self, weights: Mapping[str, Weight], vectors: Mapping[str, torch.Tensor], rope: RopeTable) -> None:
        self._weight = weights[EMBEDDING]
        self._norm = vectors[self._norm_name]

    def bind(self, plan: Plan, comm: Communicator) -> None:
        self._comm = comm
        self._embedding_site = plan[EMBEDDING]
        self._norm_site = plan[f"{EMBEDDING}.norm"]
        if self._reduces:
            self._reduce_site = plan[f"{EMBEDDING}.all_reduce"]

    def forward(self, step: Step) -> HiddenStates:
        """Returns the first layer's normed input and the residual, each ``[T, hidden]``."""
        x = as_tensor(self._embedding_site[step](self._weight, step, self._vocabulary_start))
        if self._reduces:
            x = as_tensor(self._reduce_site[step](x, self._comm))
        return as_tensor(self._norm_site[step](x, self._norm, self._eps)), x
