"""Captured decode steps: a replay leaves what the same step leaves call by call, whatever it was captured for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import (
    DeviceState,
    GraphKey,
    KVSpec,
    OperatorError,
    RopeTable,
    SampleOutput,
    SamplingSpec,
    SingleRank,
    Slice,
    Step,
    UnsupportedError,
    WeightSpec,
)
from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.step import AdapterRows, StepInput, TokenClass
from polyaccel_npu import chip
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.device import NpuDevice
from polyaccel_npu.graph import EAGER, refusals
from polyaccel_npu.step import NpuStep

ROWS, HIDDEN, HEAD, VOCABULARY, BLOCK, BLOCKS = 4, 64, 64, 32, 128, 24
RANKS, RANK_ROWS = (5, 8, 1), 24
"""True ranks of the adapters in slots 0, 1, 2, each with eight rank rows."""
WITH, WITHOUT = GraphKey(rows=ROWS, rank_rows=32), GraphKey(rows=ROWS, rank_rows=0)
Triple = tuple[int, int, float]


class OneLayer:
    """A layer between an embedding and a sampler, float16, of the operators and stations themselves."""

    def __init__(self, backend: NpuBackend, device: NpuDevice, seed: int = 0) -> None:
        self.backend, self.device, self.forwards = backend, device, 0
        self.random = torch.Generator().manual_seed(seed)
        table = (Slice(name="table", n=VOCABULARY),)
        qkv = tuple(Slice(name=name, n=n) for name, n in (("q", 2 * HEAD), ("k", HEAD), ("v", HEAD)))
        self.weights = {
            spec.site: self._weight(spec)
            for spec in (
                _spec("embed", table, HIDDEN, lookup=True),
                _spec("qkv", qkv, HIDDEN),
                _spec("o", (Slice(name="o", n=HIDDEN),), 2 * HEAD),
                _spec("head", table, HIDDEN),
            )
        }
        spec = KVSpec(layers=1, kv_heads=1, head_dim=HEAD, dtype=torch.float16, blocks=BLOCKS, block_size=BLOCK)
        self.kv = backend.allocate_kv(spec, device)
        self.sampling = backend.allocate_sampling(SamplingSpec(request_slots=8, vocabulary=VOCABULARY), device)
        self.store = backend.allocate_adapters(self.weights, rank_rows=RANK_ROWS, slots=3, device=device)
        self.state = DeviceState(kv=self.kv, adapters=self.store, sampling=self.sampling)
        angles = torch.outer(torch.arange(4 * BLOCK).float(), 10.0 ** -torch.arange(HEAD // 2).float().div(8))
        self.rope = RopeTable(
            cos=angles.cos().to(device.torch_device), sin=angles.sin().to(device.torch_device), rotary_dim=HEAD
        )
        self.norm = torch.ones(HIDDEN, dtype=torch.float16).to(device.torch_device)
        keys = torch.randn(BLOCKS * BLOCK, 1, HEAD, generator=self.random).half().to(device.torch_device)
        self.kv.write(0, torch.arange(BLOCKS * BLOCK).to(device.torch_device), keys, keys)
        self.comm, self.logits = SingleRank(), keys
        for slot in range(len(RANKS)):
            self.load(slot)

    def fn(self, name: str) -> Callable[..., Any]:
        return self.backend.table()[name][-1].fn

    def forward(self, step: Step) -> SampleOutput:
        self.forwards += 1
        weights = self.weights
        x = self.fn("embedding")(weights["embed"], step, 0)
        normed = self.fn("rms_norm")(x, self.norm, 1e-6)
        q = self.fn("qkv_rope_cache")(normed, weights["qkv"], step, self.rope, None, None, 1e-6, self.kv, 0, HEAD)
        seen = self.fn("paged_attention")(q, self.kv, 0, step, 0.125, None).flatten(1)
        y, _ = self.fn("row_parallel_add_norm")(seen, weights["o"], step, self.comm, x, self.norm, 1e-6)
        self.logits = self.fn("column_linear")(y, weights["head"], step, "logits")
        output = self.fn("sample")(self.logits, self.sampling, step)
        assert isinstance(output, SampleOutput)
        return output

    def load(self, slot: int) -> None:
        """Another adapter into a slot."""
        rank, entries, parts, at = RANKS[slot], [], [], 0
        for site, weight in self.weights.items():
            for index, part in enumerate(weight.spec.slices):
                lookup = weight.spec.lookup
                wide, high = (part.n, weight.spec.k) if lookup else (weight.spec.k, part.n)
                entry = PackedEntry(
                    site=site, slice=index, expert=None, kind="embedding" if lookup else "linear", rank=rank,
                    a_offset=at, a_shape=(rank, wide), b_offset=at + rank * wide, b_shape=(high, rank),
                )  # fmt: skip
                entries.append(entry)
                parts.append(torch.randn(rank * (wide + high), generator=self.random) * 0.2)
                at += rank * (wide + high)
        packed = PackedAdapter(buffer=torch.cat(parts).half(), entries=tuple(entries), max_rank=rank)
        self.store.write(SlotRange(slot=slot, first_rank_row=8 * slot, rank_rows=8), packed).synchronize()

    def begin(self, inputs: StepInput) -> Step:
        return self.backend.begin_step(inputs, self.state, self.device)

    def left(self, output: SampleOutput, rows: int) -> tuple[torch.Tensor, ...]:
        """Logits, keys and values of the step's rows."""
        self.device.synchronize()
        keys, values = self.kv.layer(0)
        cached = [part[: BLOCKS // 2].float().cpu() for part in (keys, values)]
        return self.logits[:rows].float().cpu(), *cached, self.sampling.last_tokens()[:rows].cpu()

    def _weight(self, spec: WeightSpec) -> Any:
        weight = self.backend.allocate_weight(spec, self.device)
        for index, part in enumerate(spec.slices):
            weight.write(index, (torch.randn(part.n, spec.k, generator=self.random) / 8).half())
        weight.seal()
        return weight


def _spec(site: str, slices: tuple[Slice, ...], k: int, lookup: bool = False) -> WeightSpec:
    return WeightSpec(site=site, slices=slices, k=k, dtype=torch.float16, rank_rows=RANK_ROWS, lookup=lookup)


def decode(
    ids: Sequence[int], contexts: Sequence[int], triples: Sequence[Triple], tables: np.ndarray | None = None
) -> StepInput:
    """A decode step of these sequences, filled up to :data:`ROWS` as the engine does; blocks of row i from 3 i on."""
    rows, missing = len(ids), ROWS - len(ids)
    if tables is None:
        width = max(-(-context // BLOCK) for context in contexts)
        tables = np.zeros((ROWS, width), dtype=np.int32)
        for row in range(rows):
            tables[row] = 3 * row + np.arange(width)
    slots = [int(tables[i, (c - 1) // BLOCK]) * BLOCK + (c - 1) % BLOCK for i, c in enumerate(contexts)]
    found = AdapterRows.build(
        np.array([t[0] for t in triples], dtype=np.int32),
        np.array([t[1] for t in triples], dtype=np.int32),
        np.array([t[2] for t in triples], dtype=np.float32),
    )
    return StepInput(
        token_class=TokenClass.DECODE,
        token_ids=np.array([*ids, *[0] * missing], dtype=np.int64),
        positions=np.array([*(c - 1 for c in contexts), *[0] * missing], dtype=np.int64),
        query_starts=np.arange(ROWS + 1, dtype=np.int32),
        context_lengths=np.array([*contexts, *[0] * missing], dtype=np.int32),
        block_tables=tables,
        kv_slots=np.array([*slots, *[-1] * missing], dtype=np.int64),
        request_slots=np.array([*range(rows), *[7] * missing], dtype=np.int32),
        logits_rows=np.arange(ROWS, dtype=np.int32),
        sample_slots=np.array([*range(rows), *[7] * missing], dtype=np.int32),
        uniforms=np.zeros(ROWS, dtype=np.float32),
        adapters={"tokens": found, "logits": found} if triples else {},
    )


@st.composite
def steps(draw: st.DrawFn, adapters: bool = True) -> StepInput:
    rows = draw(st.integers(1, ROWS))
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=rows, max_size=rows))
    contexts = draw(st.lists(st.integers(1, 3 * BLOCK), min_size=rows, max_size=rows))
    pairs = st.tuples(st.integers(0, rows - 1), st.integers(0, 2), st.sampled_from([1.0, 0.5, -2.0]))
    chosen = draw(st.lists(pairs, max_size=6, unique_by=lambda t: t[:2])) if adapters else []
    return decode(ids, contexts, sorted(chosen, key=lambda t: (t[1], t[0])))


def assert_alike(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], what: str) -> None:
    for name, got, expected in zip(("logits", "keys", "values"), found[:3], wanted[:3], strict=True):
        at = f"{what}, {name}"
        torch.testing.assert_close(got, expected, rtol=4e-3, atol=2e-2, msg=lambda text, at=at: f"{at}: {text}")


@given(first=steps(), others=st.lists(steps(), min_size=1, max_size=3))
@settings(max_examples=6, deadline=None)
def test_a_replay_leaves_what_the_step_leaves_call_by_call(first: StepInput, others: list[StepInput]) -> None:
    backend = NpuBackend()
    device = backend.devices()[0]
    eager, captured = OneLayer(backend, device), OneLayer(backend, device)  # type: ignore[arg-type]
    wanted = []
    for inputs in (first, *others, first):
        rows = int((inputs.context_lengths > 0).sum())
        wanted.append(eager.left(eager.forward(eager.begin(inputs)), rows))
    graph = backend.capture(WITH, captured.forward, captured.begin(first))
    forwards, logits = captured.forwards, captured.logits
    for number, (inputs, expected) in enumerate(zip((first, *others, first), wanted, strict=True)):
        output = graph.replay(captured.begin(inputs))
        assert captured.logits is logits
        found = captured.left(output, len(expected[0]))
        assert_alike(found, expected, f"replay {number}")
    assert captured.forwards == forwards, "captured again"
    graph.close()


@given(inputs=st.lists(steps(adapters=False), min_size=2, max_size=3))
@settings(max_examples=4, deadline=None)
def test_a_graph_without_adapters_leaves_the_same_and_launches_nothing_for_them(inputs: list[StepInput]) -> None:
    backend = NpuBackend()
    device = backend.devices()[0]
    eager, captured = OneLayer(backend, device), OneLayer(backend, device)  # type: ignore[arg-type]
    wanted = [eager.left(eager.forward(eager.begin(one)), int((one.context_lengths > 0).sum())) for one in inputs]
    graph = backend.capture(WITHOUT, captured.forward, captured.begin(inputs[0]))
    for one, expected in zip(inputs, wanted, strict=True):
        with backend.ledger.capture() as launches:
            output = graph.replay(captured.begin(one))
        assert_alike(captured.left(output, len(expected[0])), expected, "replay")
        assert not [name for name in launches if "sgmv" in name or name == EAGER]
    graph.close()


def test_adapters_are_swapped_without_a_capture(backend: NpuBackend, device: NpuDevice) -> None:
    eager, captured = OneLayer(backend, device), OneLayer(backend, device)
    inputs = decode([3, 5, 7, 9], [4, 200, 1, 300], [(0, 0, 1.0), (2, 1, 1.0), (3, 1, 0.5), (3, 2, 1.0)])
    graph = backend.capture(WITH, captured.forward, captured.begin(inputs))
    forwards, seen = captured.forwards, []
    for slot in (0, 1, 2, 1):
        for model in (eager, captured):
            model.load(slot)
        wanted = eager.left(eager.forward(eager.begin(inputs)), ROWS)
        found = captured.left(graph.replay(captured.begin(inputs)), ROWS)
        assert_alike(found, wanted, f"slot {slot} loaded anew")
        seen.append(found[0])
    assert captured.forwards == forwards
    assert not any(torch.equal(a, b) for a, b in pairwise(seen)), "a swap changed nothing"
    graph.close()


def test_metadata_stays_where_it_is(backend: NpuBackend, device: NpuDevice) -> None:
    model = OneLayer(backend, device)
    names = ("token_ids", "positions", "context_lengths", "block_tables", "sample_slots", "uniforms")
    places: set[tuple[int, ...]] = set()
    for contexts in ([1, 1], [300, 2, 129], [128, 128, 128, 384]):
        step = model.begin(decode([1] * len(contexts), contexts, [(0, 0, 1.0)]))
        assert isinstance(step, NpuStep)
        cover = step.arena.view("tokens.mix", 1)
        places.add(
            (*(step.tensor(name).data_ptr() for name in names), step.stored().slots.data_ptr(), cover.data_ptr())
        )
    assert len(places) == 1


def test_graphs_can_be_captured_again_after_all_have_been_closed(backend: NpuBackend, device: NpuDevice) -> None:
    model = OneLayer(backend, device)
    step = model.begin(decode([1, 2], [3, 4], []))
    wanted, held = model.left(model.forward(step), 2), []
    for _ in range(3):
        graphs = [backend.capture(WITHOUT, model.forward, step) for _ in range(2)]
        assert_alike(model.left(graphs[-1].replay(step), 2), wanted, "after others were closed")
        # Memory of a pool that has ended, still in use.
        held.append(model.logits)
        for graph in graphs:
            graph.close()


def test_a_context_that_outgrows_its_block_table_is_captured_anew_and_right(
    backend: NpuBackend, device: NpuDevice
) -> None:
    eager, captured = OneLayer(backend, device), OneLayer(backend, device)
    short = decode([1], [3], [])
    wide = np.zeros((ROWS, 11), dtype=np.int32)
    wide[0] = np.arange(11)
    long = decode([1], [3 * BLOCK], [], wide)
    wanted = [eager.left(eager.forward(eager.begin(one)), 1) for one in (short, long)]
    graph = backend.capture(WITHOUT, captured.forward, captured.begin(short))
    for inputs, expected in zip((short, long), wanted, strict=True):
        assert_alike(captured.left(graph.replay(captured.begin(inputs)), 1), expected, "replay")
    graph.close()


def test_a_step_whose_sequences_share_more_blocks_than_fia_takes_runs_call_by_call(
    backend: NpuBackend, device: NpuDevice
) -> None:
    eager, captured = OneLayer(backend, device), OneLayer(backend, device)
    small = decode([1, 2, 3, 4], [5, 6, 7, 8], [])
    shared = np.tile(np.arange(9, dtype=np.int32), (ROWS, 1))
    shared[:, -1] += np.arange(ROWS, dtype=np.int32)
    large = decode([1, 2, 3, 4], [8 * BLOCK + i for i in (1, 2, 3, 4)], [], shared)
    large.positions[:] = 3
    eager.forward(eager.begin(small))
    wanted = eager.left(eager.forward(eager.begin(large)), ROWS)
    graph = backend.capture(WITHOUT, captured.forward, captured.begin(small))
    with backend.ledger.capture() as launches:
        output = graph.replay(captured.begin(large))
    assert launches[EAGER] == 1
    assert launches["npu.fused_infer_attention_score"] == 2, "36 blocks, of which one call takes 26"
    assert_alike(captured.left(output, ROWS), wanted, "too many blocks")
    graph.close()


def test_adapters_that_run_as_a_composite_run_call_by_call_and_others_are_captured(
    backend: NpuBackend, device: NpuDevice
) -> None:
    """Found by the suite's Mixtral with adapters on its experts: the capture was refused, and the engine died of it."""
    model = OneLayer(backend, device)

    def forward(step: Step) -> SampleOutput:
        x = torch.full((ROWS, HIDDEN), 0.5, dtype=torch.float16, device=device.torch_device)
        y = torch.zeros((ROWS, VOCABULARY), dtype=torch.float16, device=device.torch_device)
        backend.composites()["sgmv"](y, x, model.weights["head"], step, "logits")
        output = model.fn("sample")(y, model.sampling, step)
        assert isinstance(output, SampleOutput)
        return output

    graph = backend.capture(WITH, forward, model.begin(decode([1, 2], [3, 4], [(0, 0, 1.0)])))
    for rows in ([(0, 0, 1.0)], [(0, 1, 1.0), (1, 0, 1.0)]):
        inputs = decode([1, 2], [3, 4], rows)
        wanted = forward(model.begin(inputs)).ids.cpu()
        with backend.ledger.capture() as launches:
            found = graph.replay(model.begin(inputs)).ids.cpu()
        assert launches[EAGER] == 1
        assert torch.equal(found, wanted)
    graph.close()
    held = backend.capture(WITHOUT, model.forward, model.begin(decode([1, 2], [3, 4], [])))
    with backend.ledger.capture() as launches:
        held.replay(model.begin(decode([1, 2], [3, 4], [])))
    assert EAGER not in launches
    held.close()


def test_steps_of_another_key_are_refused(backend: NpuBackend, device: NpuDevice) -> None:
    model = OneLayer(backend, device)
    example = model.begin(decode([1], [1], [(0, 0, 1.0)]))
    graph = backend.capture(GraphKey(rows=ROWS, rank_rows=8), model.forward, example)
    with pytest.raises(OperatorError, match="end at rank row 16"):
        graph.replay(model.begin(decode([1], [1], [(0, 1, 1.0)])))
    graph.close()
    with pytest.raises(OperatorError, match="4 rows"):
        backend.capture(GraphKey(rows=2, rank_rows=0), model.forward, model.begin(decode([1], [1], [])))


@pytest.mark.parametrize(
    ("family", "environment", "reason"),
    [
        (chip.P310, {}, "310P captures no graphs"),
        (chip.A2, {"TASK_QUEUE_ENABLE": "2"}, "TASK_QUEUE_ENABLE=2"),
        (chip.A2, {"ASCEND_LAUNCH_BLOCKING": "1"}, "ASCEND_LAUNCH_BLOCKING=1"),
    ],
)
def test_what_stands_against_graphs_is_said(
    monkeypatch: pytest.MonkeyPatch, family: chip.Chip, environment: Mapping[str, str], reason: str
) -> None:
    for name in ("TASK_QUEUE_ENABLE", "ASCEND_LAUNCH_BLOCKING"):
        monkeypatch.delenv(name, raising=False)
    assert refusals(chip.A2) == refusals(chip.A3) == []
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [found for found in refusals(family) if reason in found]
    if environment:
        with pytest.raises(UnsupportedError, match=reason):
            NpuBackend().capture(WITHOUT, lambda step: SampleOutput(ids=torch.zeros(1)), None)  # type: ignore[arg-type]
