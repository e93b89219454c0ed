"""A decoder-only model of pre-norm layers: embedding, (attention, feed-forward) x layers, language-model head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.plan import Plan, SiteRequest
from polyaccel.backend.step import Step
from polyaccel.backend.weight import Weight
from polyaccel.lora.target import AdapterTarget
from polyaccel.models.attention import Attention
from polyaccel.models.block import Block, FeedForward
from polyaccel.models.embedding import Embedding
from polyaccel.models.lm_head import LM_HEAD, LMHead
from polyaccel.models.loading import Meter, Progress, Source, VectorSource, by_site, check, share, write
from polyaccel.models.model import Model, ModelOptions
from polyaccel.models.rope_table import rope_table
from polyaccel.models.shard import ModelShard
from polyaccel.weights.checkpoint import Checkpoint

FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer; both halves lie on one device."""

    attention: Attention
    feed_forward: FeedForward


class DecoderModel(Model):
    """The flow that all pre-norm families share; a family says what its feed-forward is.

    A layer's last station takes the next layer's norm weight, so that each layer receives and hands on
    (normed, residual).
    """

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        config, devices = options.config, options.devices
        self.vocabulary = config.vocab_size
        self.shard = ModelShard.of(
            config,
            rank=options.rank,
            world_size=options.world_size,
            dtype=options.dtype,
            rank_rows=options.rank_rows,
            equal=options.backend.needs_equal_shards,
        )
        self._devices = tuple({device.index: device for device in devices}.values())
        self._embedding = Embedding(self.shard, devices[0], norm=_input_norm(0))
        self._layers = tuple(self._build_layers())
        tied = config.tie_embeddings and devices[0].index == devices[-1].index
        self._head = LMHead(self.shard, devices[-1], tied=tied)
        self._weights: dict[str, Weight] | None = None
        self._sealed = False

    @abstractmethod
    def build_feed_forward(self, layer: int, device: Device, next_norm: str) -> FeedForward:
        """The second half of a layer, with the tensor name of the norm that follows it."""

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[Device, ...]:
        return self._devices

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        """The layers in order, for whoever runs them one by one."""
        return self._layers

    def requests(self) -> list[SiteRequest]:
        return [request for block in self._blocks() for request in block.requests()]

    def targets(self, device_index: int | None = None) -> tuple[AdapterTarget, ...]:
        return tuple(target for block in self._blocks_on(device_index) for target in block.targets())

    # -- weights -----------------------------------------------------------------------------------------------------

    def weights(self, device_index: int | None = None) -> dict[str, Weight]:
        if self._weights is None:
            self._weights = self._allocate()
        here = [spec.site for block in self._blocks_on(device_index) for spec in block.specs()]
        return {site: self._weights[site] for site in here}

    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        sources, vectors = self._sources(checkpoint), self._vectors()
        check(checkpoint, sources, vectors, self._harmless())
        matrices = sum(share(checkpoint, source) for source in sources)
        meter = Meter(matrices + sum(share(checkpoint, vector) for vector in vectors), progress)
        weights = self.weights()
        if self._sealed:
            for weight in weights.values():
                weight.reopen()
        for site, of_site in by_site(sources).items():
            write(checkpoint, weights[site], of_site, meter)
        # Tied weights have no source of their own and are packed once their values are there.
        for weight in weights.values():
            weight.seal()
        self._sealed = True
        ropes = {
            device.index: rope_table(self.options.config.rope, self.options.max_positions, device)
            for device in self._devices
        }
        for block in self._blocks():
            uploaded: dict[str, torch.Tensor] = {}
            for vector in block.vectors():
                uploaded[vector.name] = block.device.upload(checkpoint.read(vector.name).to(self.options.dtype))
                meter.add(share(checkpoint, vector))
            block.attach(weights, uploaded, ropes[block.device.index])

    def reload(self, checkpoint: Checkpoint, site: str) -> None:
        weights = self.weights()
        if site not in weights:
            raise ConfigurationError(f"no weight at site {site!r}; the model has {', '.join(weights)}")
        target = weights[site].spec.tied_to or site
        sources = [source for source in self._sources(checkpoint) if source.site == target]
        check(checkpoint, sources, ())
        sharing = [weight for weight in weights.values() if weight.spec.tied_to == target]
        for weight in (weights[target], *sharing):
            weight.reopen()
        write(checkpoint, weights[target], sources, Meter(0, None))
        for weight in sharing:
            weight.seal()

    def _allocate(self) -> dict[str, Weight]:
        weights: dict[str, Weight] = {}
        for block in self._blocks():
            for spec in block.specs():
                tied = None if spec.tied_to is None else weights[spec.tied_to]
                weights[spec.site] = self.options.backend.allocate_weight(spec, block.device, tied)
        return weights

    def _sources(self, checkpoint: Checkpoint) -> list[Source]:
        names = frozenset(checkpoint.names())
        return [source for block in self._blocks() for source in block.sources(names)]

    def _vectors(self) -> list[VectorSource]:
        return [vector for block in self._blocks() for vector in block.vectors()]

    def _harmless(self) -> tuple[str, ...]:
        # Some exports write the tied matrix under both names; the embedding's is the one that counts.
        return (f"{LM_HEAD}.weight",) if self.options.config.tie_embeddings else ()

    # -- stepping ----------------------------------------------------------------------------------------------------

    def bind(self, plan: Plan, comm: Communicator) -> None:
        for block in self._blocks():
            block.bind(plan, comm)

    def kv_spec(self, blocks: int, block_size: int, dtype: torch.dtype, device_index: int | None = None) -> KVSpec:
        if device_index is None and len(self._devices) > 1:
            raise ConfigurationError(f"layers lie on {len(self._devices)} devices; say for which one")
        index = self._devices[0].index if device_index is None else device_index
        layers = sum(device.index == index for device in self.options.devices)
        if not layers:
            raise ConfigurationError(f"no layer lies on device {index}")
        return KVSpec(
            layers=layers,
            kv_heads=self.shard.heads.num_kv,
            head_dim=self.options.config.head_dim,
            dtype=dtype,
            blocks=blocks,
            block_size=block_size,
        )

    def bind_kv(self, kv: KVCache | Mapping[int, KVCache]) -> None:
        caches = {device.index: kv for device in self._devices} if isinstance(kv, KVCache) else kv
        missing = [device.index for device in self._devices if device.index not in caches]
        if missing or (isinstance(kv, KVCache) and len(self._devices) > 1):
            raise ConfigurationError(
                f"layers lie on the devices {[device.index for device in self._devices]}; each needs its own KV cache"
            )
        for layer in self._layers:
            layer.attention.bind_kv(caches[layer.attention.device.index])

    def forward(self, steps: Mapping[int, Step]) -> torch.Tensor:
        device = self._embedding.device
        step = steps[device.index]
        x, residual = self._embedding.forward(step)
        for layer in self._layers:
            if layer.attention.device.index != device.index:
                device = layer.attention.device
                step = steps[device.index]
                x, residual = _move(x, device), _move(residual, device)
            x, residual = layer.attention.forward(x, residual, step)
            x, residual = layer.feed_forward.forward(x, residual, step)
        return self._head.forward(x, step)

    def _build_layers(self) -> Iterator[DecoderLayer]:
        seen: dict[int, int] = {}
        last = self.options.config.num_layers - 1
        for layer, device in enumerate(self.options.devices):
            kv_layer = seen.get(device.index, 0)
            seen[device.index] = kv_layer + 1
            next_norm = FINAL_NORM if layer == last else _input_norm(layer + 1)
            yield DecoderLayer(
                Attention(self.shard, device, layer=layer, kv_layer=kv_layer),
                self.build_feed_forward(layer, device, next_norm),
            )

    def _blocks(self) -> Iterator[Block]:
        yield self._embedding
        for layer in self._layers:
            yield layer.attention
            yield layer.feed_forward
        yield self._head

    def _blocks_on(self, device_index: int | None) -> Iterator[Block]:
        """The blocks on one device; all of them for None."""
        return (block for block in self._blocks() if device_index in (None, block.device.index))


def _input_norm(layer: int) -> str:
    return f"model.layers.{layer}.input_layernorm.weight"


def _move(x: torch.Tensor, device: Device) -> torch.Tensor:
    moved = device.empty(x.shape, x.dtype)
    device.copy_(moved, x)
    return moved
