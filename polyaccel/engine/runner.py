"""One rank's side of the engine: it owns weights, KV cache, adapters and sampling state, and runs steps.

The runner decides nothing about requests; it applies what it is told, in order, and reports. It lives in the engine's
own process (inline) or in a worker process, and is driven by one thread, except for :meth:`Runner.prepare_adapter`.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyaccel.backend import registry
from polyaccel.backend.adapter_store import AdapterStore, PackedAdapter, SlotRange
from polyaccel.backend.backend import Backend, RankAddress
from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device, HostCopy, ReadyHostCopy
from polyaccel.backend.errors import CommunicationError, ConfigurationError
from polyaccel.backend.failure import ran_out_of_memory
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.plan import Plan, SiteRequest
from polyaccel.backend.sampling import SampleOutput, SamplingSpec, SamplingState
from polyaccel.backend.step import DeviceState, Step, StepInput, TokenClass
from polyaccel.backend.weight import Weight
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.graphs import GraphCache
from polyaccel.engine.merging import Merger
from polyaccel.engine.messages import Capacity, StepMessage, StepResult
from polyaccel.engine.mirror import MirroredSampling
from polyaccel.engine.room import KVShare, agreed_blocks, room_for
from polyaccel.lora.adapter_file import AdapterFile
from polyaccel.lora.match import MatchedAdapter, match_adapter
from polyaccel.lora.pack import pack_adapter
from polyaccel.lora.receipt import AdapterReceipt, StageSeconds
from polyaccel.models.config import ModelConfig
from polyaccel.models.model import Model, ModelOptions
from polyaccel.models.registry import build_model
from polyaccel.weights.checkpoint import open_checkpoint

Progress = Callable[[int, int], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step whose results are on their way to the host."""

    step_id: int
    input_hash: int
    ids: HostCopy
    logprobs: HostCopy | None
    top_ids: HostCopy | None
    top_logprobs: HostCopy | None
    no_room: str = ""

    @classmethod
    def skipped(cls, step_id: int, no_room: str) -> PendingStep:
        """Of a step that was not run, or not to its end, for want of memory."""
        nothing = ReadyHostCopy(np.zeros(0, dtype=np.int64))
        return cls(step_id, 0, nothing, None, None, None, no_room)

    @property
    def is_ready(self) -> bool:
        """Whether the device had computed it when it was queued, as devices without a queue do."""
        return isinstance(self.ids, ReadyHostCopy)

    def wait(self) -> StepResult:
        return StepResult(
            step_id=self.step_id,
            ids=self.ids.wait(),
            logprobs=None if self.logprobs is None else self.logprobs.wait(),
            top_ids=None if self.top_ids is None else self.top_ids.wait(),
            top_logprobs=None if self.top_logprobs is None else self.top_logprobs.wait(),
            no_room=self.no_room,
        )


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter read, matched and packed for this rank, waiting for its slot."""

    path: str
    matched: MatchedAdapter
    packed: PackedAdapter
    file_bytes: int
    read_seconds: float
    pack_seconds: float


class Runner:
    """Loads a model on one rank and runs steps on it.

    Args:
        config: the engine's options; ``config.backend`` names a backend that is already chosen (never "auto").
        address: this rank and how to meet the others.
        backend: an instance to use instead of the named one.

    Raises:
        OutOfMemory: meeting the other ranks took more memory than there is.
    """

    def __init__(self, config: EngineConfig, address: RankAddress, backend: Backend | None = None) -> None:
        self.config = config
        self.backend = backend if backend is not None else registry.load(config.backend)
        self.address = address
        if config.batch_invariant:
            self.backend.require_batch_invariance()
        self.backend.launcher.rank = address.rank if address.world_size > 1 else None
        with room_for("the connections between ranks", self._where, "leave it more memory"):
            self.comm: Communicator = self.backend.connect(address)
        self._hash = 0
        self._apart = False
        self._no_room = ""
        self._graphs: GraphCache | None = None
        self._stores: dict[int, AdapterStore] = {}

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(self, progress: Progress | None = None) -> Capacity:
        """Read the weights, plan every site and allocate; returns what there is room for, agreed between ranks.

        Raises:
            OutOfMemory: names what found no room, how much was asked for and, of several ranks, this one.
            CommunicationError: another rank failed, or its budget is too small.
        """
        with open_checkpoint(self.config.model) as checkpoint:
            model_config = ModelConfig.from_hf(checkpoint.hf_config(), checkpoint.generation_config())
            self.model = self._build(model_config)
            advice = "spread the model over more ranks, choose a smaller dtype, or free memory there"
            with room_for("its weights", self._where, advice):
                self.model.load(checkpoint, progress)
        self.plan = Plan(self.backend, self._requests(), policy=self.config.policy, ranges=self._ranges())
        self.comm.trace = [] if self.config.trace_collectives else None
        self.model.bind(self.plan, self.comm)
        self._agree("the dispatch plan", self.plan.digest())
        return self._allocate(model_config)

    @property
    def _where(self) -> str:
        """This rank and its device, as errors name them."""
        rank = f"rank {self.address.rank} of {self.address.world_size}" if self.address.world_size > 1 else "the engine"
        device = getattr(self, "device", None)
        return rank if device is None else f"{rank} on {device.name}"

    def _build(self, config: ModelConfig) -> Model:
        available = self.backend.devices()
        layers = self.config.layer_devices
        if layers is None:
            layers = (min(self.address.rank, len(available) - 1),) * config.num_layers
        if len(layers) != config.num_layers or not all(0 <= index < len(available) for index in layers):
            raise ConfigurationError(
                f"layer_devices={list(layers)} must name one of the devices 0..{len(available) - 1} for each of the "
                f"{config.num_layers} layers"
            )
        self.devices: dict[int, Device] = {index: available[index] for index in dict.fromkeys(layers)}
        self.device = available[layers[-1]]
        self.dtype = config.dtype if self.config.dtype == "auto" else DTYPES[self.config.dtype]
        self.max_model_len = min(
            self.config.max_model_len or config.max_position_embeddings, config.max_position_embeddings
        )
        return build_model(
            ModelOptions(
                config=config,
                backend=self.backend,
                devices=tuple(available[index] for index in layers),
                rank=self.address.rank,
                world_size=self.address.world_size,
                dtype=self.dtype,
                rank_rows=self.config.adapter_rank_rows if self.config.adapters_enabled else 0,
                max_positions=self.max_model_len,
            )
        )

    def _requests(self) -> list[SiteRequest]:
        return [
            *self.model.requests(),
            SiteRequest(site="sample", operator="sample", static={"vocabulary": self.model.vocabulary}),
        ]

    def _ranges(self) -> dict[TokenClass, dict[str, tuple[int, int]]]:
        most = max(self.config.max_batched_tokens, self.config.max_num_seqs)
        segments = (0, self.config.max_num_seqs)
        context = (1, self.max_model_len)
        return {
            TokenClass.DECODE: {"tokens": (1, self.config.max_num_seqs), "segments": segments, "context": context},
            TokenClass.MIXED: {"tokens": (1, most), "segments": segments, "context": context},
        }

    def _allocate(self, config: ModelConfig) -> Capacity:
        block_size = self.backend.kv_block_size()
        shares = [share for share in self.comm.gather_objects(self._kv_share(block_size)) if isinstance(share, KVShare)]
        blocks = agreed_blocks(shares, self.address.rank)
        # One row more than requests: padding rows of graphs are sampled into it.
        spec = SamplingSpec(request_slots=self.config.max_num_seqs + 1, vocabulary=self.model.vocabulary)
        with room_for("the state of sampling", self._where, "lower max_num_seqs"):
            sampling = self.backend.allocate_sampling(spec, self.device)
        self.states: dict[int, DeviceState] = {}
        self._mirrors: list[MirroredSampling] = []
        caches: dict[int, KVCache] = {}
        for index, device in self.devices.items():
            kv_spec = self.model.kv_spec(blocks, block_size, self.dtype, index)
            cache = f"a KV cache of {blocks} blocks of {kv_spec.bytes_per_block()} bytes"
            with room_for(cache, self._where, "lower kv_cache_bytes or memory_fraction"):
                kv = caches[index] = self.backend.allocate_kv(kv_spec, device)
            store = None
            if self.config.adapters_enabled:
                slots, rank_rows = self.config.adapter_slots, self.config.adapter_rank_rows
                room = f"{slots} adapters of {rank_rows} rank rows in all"
                with room_for(room, self._where, "lower adapter_rank_rows or memory_fraction"):
                    store = self._stores[index] = self.backend.allocate_adapters(
                        self.model.weights(index), rank_rows=rank_rows, slots=slots, device=device
                    )
            here: SamplingState = sampling
            if device is not self.device:
                here = MirroredSampling(sampling, device)
                self._mirrors.append(here)
            self.states[index] = DeviceState(kv=kv, adapters=store, sampling=here)
        self.model.bind_kv(caches)
        self._sampling = sampling
        self._sample = self.plan["sample"]
        if self.config.graphs and not self.backend.graph_refusals() and len(self.devices) == 1:
            state = self.states[self.device.index]
            self._graphs = GraphCache(
                self.backend, self.device, state, self._forward_one, max_rows=self.config.max_num_seqs
            )
        self.merger = Merger(self.model, self.backend)
        return Capacity(
            kv_blocks=blocks,
            kv_block_size=block_size,
            request_slots=self.config.max_num_seqs,
            max_model_len=min(self.max_model_len, blocks * block_size),
            vocabulary=self.model.vocabulary,
            adapter_slots=self.config.adapter_slots if self.config.adapters_enabled else 0,
            rank_rows=self.config.adapter_rank_rows if self.config.adapters_enabled else 0,
            world_size=self.address.world_size,
        )

    def _kv_share(self, block_size: int) -> KVShare:
        """Of the device with the least room for its layers."""
        shares = [
            KVShare.of(
                self.config,
                rank=self.address.rank,
                world_size=self.address.world_size,
                device=device,
                weight_bytes=sum(weight.nbytes for weight in self.model.weights(index).values()),
                block_size=block_size,
                block_bytes=max(1, self.model.kv_spec(1, block_size, self.dtype, index).bytes_per_block()),
                most_blocks=self.config.max_num_seqs * -(-self.max_model_len // block_size),
            )
            for index, device in self.devices.items()
        ]
        return min(shares, key=lambda share: share.blocks)

    # -- steps -------------------------------------------------------------------------------------------------------

    def execute(self, message: StepMessage) -> PendingStep:
        """Queue one step on the device; its results arrive through the returned value.

        Where memory runs out, the step and those after it are skipped until one resumes: what it has written is written
        again. Of several ranks, the others may wait for this one in a collective: whoever drives the runner lets them
        go by :meth:`part`, and has all ranks meet again before a step resumes.

        Raises:
            CommunicationError: another rank failed, or has parted.
        """
        for slot in message.end:
            self._sampling.clear(slot)
        for slot, row in message.begin:
            self._sampling.write(slot, row)
        if message.resumes and not self._apart:
            self._no_room = ""
        if self._no_room:
            return PendingStep.skipped(message.step_id, self._no_room)
        try:
            return self._queued(message, self._run(message.inputs))
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            where = f"{self._where}: " if self.address.world_size > 1 else ""
            self._no_room = f"{where}{error}"
            return PendingStep.skipped(message.step_id, self._no_room)

    def _queued(self, message: StepMessage, output: SampleOutput) -> PendingStep:
        download = self.device.download
        return PendingStep(
            step_id=message.step_id,
            input_hash=_crc(message.inputs.block_tables, _crc(message.inputs.token_ids)),
            ids=download(output.ids),
            logprobs=None if output.logprobs is None else download(output.logprobs),
            top_ids=None if output.top_ids is None else download(output.top_ids),
            top_logprobs=None if output.top_logprobs is None else download(output.top_logprobs),
        )

    # -- ranks that part -----------------------------------------------------------------------------------------------

    @property
    def apart(self) -> bool:
        """Whether this rank has given up the group and not yet met the others again."""
        return self._apart

    def part(self, why: str) -> None:
        """Give up the group in the middle of a step, so that no rank waits for another. Steps are skipped from now on.

        Whatever the device has still queued is worth nothing.
        """
        self._apart = True
        self._no_room = self._no_room or why
        self.comm.abandon()
        with contextlib.suppress(CommunicationError):
            self.device.synchronize()
        if self._graphs is not None:
            self._graphs.clear()
        self.comm.close()

    def meet(self, init_method: str) -> None:
        """Form a new group, on every rank alike, also where this one has not noticed that another has parted.

        Raises:
            CommunicationError: a rank did not come.
            OutOfMemory: the group itself found no room.
        """
        if not self._apart:
            self.part("")
        trace = self.comm.trace
        with room_for("the connections between ranks", self._where, "leave it more memory"):
            self.comm = self.backend.connect(replace(self.address, init_method=init_method))
        self.comm.trace = trace
        self.model.bind(self.plan, self.comm)
        # Ranks have seen different numbers of steps through.
        self._apart, self._hash = False, 0

    def state_hash(self, step: PendingStep, result: StepResult) -> int:
        """Fold a step's input and result into the running hash of everything applied; ranks must agree on it.

        Called once a step, in the order of steps, however many were queued in between.
        """
        self._hash = _crc(result.ids, self._hash ^ step.input_hash)
        return self._hash

    def _run(self, inputs: StepInput) -> SampleOutput:
        if self._graphs is not None and self._graphs.accepts(inputs):
            return self._graphs.run(inputs, self._rank_rows(inputs), self.config.max_num_seqs)
        for mirror in self._mirrors:
            mirror.refresh()
        steps = {
            index: self.backend.begin_step(inputs, self.states[index], device) for index, device in self.devices.items()
        }
        return self._forward(steps)

    def _forward(self, steps: dict[int, Step]) -> SampleOutput:
        logits = self.model.forward(steps)
        step = steps[self.device.index]
        output = self._sample[step](logits, self._sampling, step)
        assert isinstance(output, SampleOutput)
        return output

    def _forward_one(self, step: Step) -> SampleOutput:
        return self._forward({self.device.index: step})

    def _rank_rows(self, inputs: StepInput) -> int:
        """What the step's graph must cover."""
        store = self._stores.get(self.device.index)
        if store is None or not inputs.has_adapters:
            return 0
        named = {int(slot) for rows in inputs.adapters.values() for slot in rows.segment_slots}
        return store.graph_rank_rows(named, inputs.tokens)

    # -- adapters ----------------------------------------------------------------------------------------------------

    def prepare_adapter(self, path: str, *, allow_unmatched: bool, allow_no_effect: bool) -> PreparedAdapter:
        """Read, match and pack an adapter for this rank. Touches no device; safe beside running steps."""
        begun = time.perf_counter()
        file = AdapterFile.open(path)
        matched = match_adapter(
            file, self.model.targets(), allow_unmatched=allow_unmatched, allow_no_effect=allow_no_effect
        )
        read = time.perf_counter()
        packed = pack_adapter(matched.pairs, dtype=self.dtype)
        packed_at = time.perf_counter()
        file_bytes = sum(pair.nbytes for pair in file.pairs.values())
        return PreparedAdapter(path, matched, packed, file_bytes, read - begun, packed_at - read)

    def commit_adapter(self, prepared: PreparedAdapter, name: str, where: SlotRange, generation: int) -> AdapterReceipt:
        """Extend the plan, write the slot on every device and wait until it has arrived.

        Raises:
            UnsupportedError: policy strict and the backend refuses this rank; plan and slot are unchanged.
        """
        begun = time.perf_counter()
        if self.plan.extend(prepared.matched.max_rank) and self._graphs is not None:
            self._graphs.clear()
        try:
            for index, store in self._stores.items():
                store.write(where, _only(prepared.packed, self.model.weights(index))).synchronize()
        except Exception:
            self.clear_adapter(where.slot)
            raise
        copied = time.perf_counter() - begun
        total = prepared.read_seconds + prepared.pack_seconds + copied
        receipt = AdapterReceipt(
            name=name,
            path=prepared.path,
            generation=generation,
            entries=prepared.matched.entries,
            notes=prepared.matched.notes,
            file_bytes=prepared.file_bytes,
            packed_bytes=prepared.packed.buffer.numel() * prepared.packed.buffer.element_size(),
            seconds=StageSeconds(read=prepared.read_seconds, pack=prepared.pack_seconds, copy=copied, total=total),
        )
        return receipt.with_implementations(self._implementations(receipt))

    def _implementations(self, receipt: AdapterReceipt) -> dict[str, str]:
        sites = dict.fromkeys(entry.site for entry in receipt.applied)
        return {site: str(self.plan[site].planned[1]) for site in sites if site in self.plan.sites}

    def clear_adapter(self, slot: int) -> None:
        for store in self._stores.values():
            store.clear(slot)

    def plan_digest(self) -> str:
        return self.plan.digest()

    # -- the rest ----------------------------------------------------------------------------------------------------

    def explain(self) -> dict[str, object]:
        """Plan, ledger and graph counts as plain values."""
        graphs = None if self._graphs is None else {"captures": self._graphs.captures, "replays": self._graphs.replays}
        return {
            "rank": self.address.rank,
            "plan": self.plan.to_dict(),
            "ledger": self.backend.ledger.counts(),
            "graphs": graphs,
            "graph_refusals": self.backend.graph_refusals(),
            "transport": self.comm.transport,
            "weight_bytes": sum(w.nbytes for w in self.model.weights().values()),
        }

    def collectives(self) -> list[tuple[str, int]]:
        """The traced collectives since the last call, as (kind, bytes); empty unless tracing is on."""
        traced = [(c.kind, c.nbytes) for c in self.comm.trace or []]
        if self.comm.trace is not None:
            self.comm.trace.clear()
        return traced

    def merge_adapter(self, path: str, weight: float) -> None:
        self.device.synchronize()
        self.merger.merge(path, weight)

    def unmerge_adapters(self) -> None:
        self.device.synchronize()
        with open_checkpoint(self.config.model) as checkpoint:
            self.merger.unmerge(checkpoint)

    def _agree(self, what: str, value: str) -> None:
        values = self.comm.gather_objects(value)
        if len(set(map(str, values))) > 1:
            raise CommunicationError(f"ranks disagree about {what}: {values}; all ranks must run the same software")

    def close(self) -> None:
        """Free graphs before the communicator, then the rest. Idempotent."""
        if self._graphs is not None:
            self._graphs.clear()
        self.comm.close()
        self.backend.close()


def _crc(array: np.ndarray, start: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data, start)


def _only(packed: PackedAdapter, sites: Mapping[str, Weight]) -> PackedAdapter:
    entries = tuple(entry for entry in packed.entries if entry.site in sites)
    if len(entries) == len(packed.entries):
        return packed
    return PackedAdapter(buffer=packed.buffer, entries=entries, max_rank=packed.max_rank)
