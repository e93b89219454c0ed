"""Hidden states to logits."""

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
from polyaccel.models.block import Block, as_tensor
from polyaccel.models.embedding import EMBEDDING, EMBEDDING_MODULE
from polyaccel.models.loading import Source, VectorSource
from polyaccel.models.shard import ModelShard
from polyaccel.models.sources import embedding_source
from polyaccel.parallel.cut import Rows

LM_HEAD = "lm_head"


class LMHead(Block):
    """Hidden states to logits, cut by vocabulary and gathered. ``tied`` shares the embedding's values."""

    def __init__(self, shard: ModelShard, device: Device, *, tied: bool) -> None:
        super().__init__(shard, device)
        self._spec = shard.spec(
            LM_HEAD,
            (Slice(name="lm_head", n=shard.vocabulary.size),),
            shard.config.hidden_size,
            tied_to=EMBEDDING if tied else None,
        )
        self._gathers = shard.world_size > 1
        self._weight: Weight
        self._comm: Communicator
        self._select_site: Site
        self._linear_site: Site
        self._gather_site: Site

    def requests(self) -> list[SiteRequest]:
        requests = [
            self.shard.request("select_rows", "select_rows"),
            self.shard.linear_request("column_linear", self._spec, row_set="logits"),
        ]
        if self._gathers:
            requests.append(self.shard.request(f"{LM_HEAD}.all_gather", "all_gather", vocabulary=self._spec.n, dim=-1))
        return requests

    def specs(self) -> list[WeightSpec]:
        return [self._spec]

    def sources(self, names: Collection[str]) -> list[Source]:
        if self._spec.tied_to is not None:
            return []
        # On another device than the embedding, tied values are read a second time.
        module = EMBEDDING_MODULE if self.shard.config.tie_embeddings else LM_HEAD
        return [embedding_source(self.shard, f"{module}.weight", LM_HEAD)]

    def vectors(self) -> list[VectorSource]:
        return []

    def targets(self) -> list[AdapterTarget]:
        config = self.shard.config
        target = AdapterTarget(
            module=LM_HEAD,
            site=LM_HEAD,
            slice=0,
            in_features=config.hidden_size,
            out_features=config.vocab_size,
            out_rows=self.shard.vocabulary.rows,
            padded_rows=self.shard.vocabulary.size,
            in_cols=Rows.whole(config.hidden_size),
        )
        return [target]

    def attach(self, weights: Mapping[str, Weight], vectors: Mapping[str, torch.Tensor], rope: RopeTable) -> None:
        self._weight = weights[LM_HEAD]

    def bind(self, plan: Plan, comm: Communicator) -> None:
        self._comm = comm
        self._select_site, self._linear_site = plan["select_rows"], plan[LM_HEAD]
        if self._gathers:
            self._gather_site = plan[f"{LM_HEAD}.all_gather"]

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``x: [T, hidden]``, after the final norm; returns ``[R, vocabulary]``, a view without the padding."""
        rows = self._select_site[step](x, step)
        logits = as_tensor(self._linear_site[step](rows, self._weight, step, "logits"))
        if self._gathers:
            logits = as_tensor(self._gather_site[step](logits, self._comm, -1))
        return logits[:, : self.shard.config.vocab_size]
