"""One rank's part of a small model on the bench, its layers run one by one on inputs of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import AdapterStore, DeviceState, KVCache, SlotRange, Step, StepInput
from polyaccel.backend.plan import Plan, Site
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.models.chain import LayerInput, RankShare
from polyaccel_conformance.models.families import FAMILIES, POSITIONS
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.problems.kv_cache import fill, stored
from polyaccel_conformance.problems.steps import Paging

if TYPE_CHECKING:
    from polyaccel.models.decoder import DecoderModel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RESULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv": ("q",),
        "attention": ("attention",),
        "o": ("o", "o residual"),
        "gate_up": ("gate_up",),
        "down": ("down", "down residual"),
        "router": ("router",),
        "router.route": ("weights", "ids"),
        "experts": ("experts",),
        "experts.all_reduce": ("all_reduce",),
        "experts.norm": ("norm", "norm residual"),
    }
)
"""What each of a layer's sites gives."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankModel:
    """A model that is loaded, planned and bound, with what its stations gave.

    Attributes:
        shares: what every rank holds.
        store: the adapters, None without.
        seen: on the host, the latest result of each station by ``layers.<number>.<station>``.
    """

    bench: Bench
    model: DecoderModel
    plan: Plan
    shares: tuple[RankShare, ...]
    store: AdapterStore | None
    seen: dict[str, torch.Tensor] = field(default_factory=dict)

    def allocate(self, paging: Paging) -> KVCache:
        """A cache with the paging's blocks, bound to the model."""
        options = self.model.options
        kv = self.bench.backend.allocate_kv(
            self.model.kv_spec(paging.blocks, paging.block_size, options.dtype), self.bench.device
        )
        self.model.bind_kv(kv)
        return kv

    def begin(self, inputs: StepInput, kv: KVCache) -> Step:
        return self.bench.begin_step(inputs, DeviceState(kv=kv, adapters=self.store))

    def remember(self, kv: KVCache, number: int, given: LayerInput, paging: Paging) -> None:
        """Put the older keys and values of this rank's heads into a layer of the cache; padding heads are zero."""
        first, last = self.shares[self.model.options.rank].kv_heads
        room = kv.spec.kv_heads
        for sequence, (old_k, old_v) in enumerate(given.older):
            padded = []
            for old in (old_k, old_v):
                own = np.zeros((len(old), room, old.shape[2]))
                own[:, : last - first] = old[:, first:last]
                padded.append(self._host(own))
            fill(self.bench, kv, number, paging.slots(sequence, 0, len(old_k)), *padded)

    def run(self, number: int, given: LayerInput, step: Step, kv: KVCache, slots: Ints) -> None:
        """One layer; its stations' results, and the keys and values in ``slots`` afterwards, are then in ``seen``."""
        layer = self.model.layers[number]
        x, residual = (self.bench.upload(self._host(values)) for values in (given.x, given.residual))
        x, residual = layer.attention.forward(x, residual, step)
        layer.feed_forward.forward(x, residual, step)
        self.bench.synchronize()
        k, v = stored(self.bench, kv, number, slots)
        first, last = self.shares[self.model.options.rank].kv_heads
        self.seen[f"layers.{number}.k"], self.seen[f"layers.{number}.v"] = k[:, : last - first], v[:, : last - first]

    def _host(self, values: Floats) -> torch.Tensor:
        return Operand.rounded(values, format_of(self.model.options.dtype).name).torch()


def open_model(
    bench: Bench, folder: Path, family: str, dtype: str, adapters: Sequence[Path], rank: int, world_size: int
) -> RankModel:
    """Build, load, plan and bind a rank's part, and write the adapters into slots 0, 1, ... as the engine does.

    Raises:
        PolyaccelError: whatever loading raises.
    """
    from polyaccel.lora.adapter_file import AdapterFile
    from polyaccel.lora.match import match_adapter
    from polyaccel.lora.pack import pack_adapter
    from polyaccel.models.config import ModelConfig
    from polyaccel.models.decoder import DecoderModel
    from polyaccel.models.model import ModelOptions
    from polyaccel.models.registry import build_model
    from polyaccel.weights.checkpoint import open_checkpoint

    files = [AdapterFile.open(path) for path in adapters]
    rank_rows = sum(max(pair.numbers.true_rank for pair in file.pairs.values()) for file in files)
    model = build_model(
        ModelOptions(
            config=ModelConfig.from_hf(FAMILIES[family].config()),
            backend=bench.backend,
            devices=(bench.device,) * FAMILIES[family].layers,
            rank=rank,
            world_size=world_size,
            dtype=format_of(dtype).torch,
            rank_rows=rank_rows,
            max_positions=POSITIONS,
        )
    )
    assert isinstance(model, DecoderModel)
    with open_checkpoint(str(folder)) as checkpoint:
        model.load(checkpoint)
    plan = Plan(bench.backend, model.requests(), policy="allow")
    store: AdapterStore | None = None
    if files:
        store = bench.backend.allocate_adapters(
            model.weights(), rank_rows=rank_rows, slots=len(files), device=bench.device
        )
        first = 0
        for slot, file in enumerate(files):
            matched = match_adapter(file, model.targets())
            plan.extend(matched.max_rank)
            where = SlotRange(slot=slot, first_rank_row=first, rank_rows=matched.max_rank)
            store.write(where, pack_adapter(matched.pairs, dtype=model.options.dtype)).synchronize()
            first += matched.max_rank
    found = RankModel(bench=bench, model=model, plan=plan, shares=_shares(model, world_size), store=store)
    model.bind(plan, bench.comm)
    for site in plan.sites.values():
        _tap(found, site)
    return found


def _shares(model: DecoderModel, world_size: int) -> tuple[RankShare, ...]:
    from polyaccel.models.shard import ModelShard

    options = model.options
    shards = [
        ModelShard.of(
            options.config,
            rank=rank,
            world_size=world_size,
            dtype=options.dtype,
            rank_rows=options.rank_rows,
            equal=options.backend.needs_equal_shards,
        )
        for rank in range(world_size)
    ]
    return tuple(
        RankShare(
            heads=shard.heads.cut.q_heads, kv_heads=shard.heads.cut.kv_heads, inner=shard.intermediate.rows.ranges
        )
        for shard in shards
    )


def _tap(model: RankModel, site: Site) -> None:
    """Note what the site gives: its results may be overwritten by the next call."""
    head, number, name = (*site.name.split(".", 2), "", "")[:3]
    if head != "layers" or name not in RESULTS:
        return

    def tapped(call: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object) -> object:
            result = call(*arguments)
            model.bench.synchronize()
            for station, part in zip(RESULTS[name], result if isinstance(result, tuple) else (result,), strict=True):
                assert isinstance(part, torch.Tensor)
                own = _without_padding(model, station, part)
                model.seen[f"layers.{number}.{station}"] = own.detach().to("cpu", copy=True)
            return result

        return noted

    site.assign(site.planned, [tapped(call) for call in site.calls])


def _without_padding(model: RankModel, station: str, result: torch.Tensor) -> torch.Tensor:
    """The rank's own heads and columns: where shards are equal, zeros that no oracle knows follow them."""
    options = model.model.options
    share = model.shares[options.rank]
    if station in ("q", "attention"):
        first, last = share.heads
        width = (last - first) * options.config.head_dim
    elif station == "gate_up":
        width = len(share.columns)
    else:
        return result
    return result.reshape(len(result), -1)[:, :width]
