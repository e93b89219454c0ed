"""The folded backend keeps the contract's storage and ordering rules in the hardest way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import (
    DeviceLost,
    DeviceState,
    GraphKey,
    KVSpec,
    OperatorError,
    PackedAdapter,
    Quantisation,
    SampleOutput,
    SamplingRow,
    SamplingSpec,
    SlotRange,
    Step,
    StepInput,
    Weight,
)
from tests.backend.composite.cases import Draw, Module, pack, spec_of, step_input
from tests.backends.folded.adapter_store import FoldedAdapterStore
from tests.backends.folded.backend import FoldedBackend
from tests.backends.folded.weight import FoldedWeight

VOCABULARY = 13


def _weight(backend: FoldedBackend, widths: list[int], k: int, draw: Draw, **other: Any) -> FoldedWeight:
    spec = spec_of("site", widths, k, **other)
    weight = backend.allocate_weight(spec, backend.device)
    assert isinstance(weight, FoldedWeight)
    for expert in (None,) if spec.experts is None else range(spec.experts):
        for index, width in enumerate(widths):
            weight.write(index, draw.tensor(width, k), expert=expert)
    weight.seal()
    return weight


def _packed(weight: Weight, ranks: list[int], draw: Draw) -> PackedAdapter:
    """Random matrices for every slice of a weight."""
    modules = [Module(weight.spec.site, index, rank) for index, rank in enumerate(ranks)]
    return pack({weight.spec.site: weight}, modules, draw)  # type: ignore[dict-item]


# -- weights and adapters ----------------------------------------------------------------------------------------------


@given(
    widths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    k=st.integers(0, 30),
    rank_rows=st.integers(0, 20),
    experts=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 999),
)
def test_a_weight_comes_back_as_it_was_written(
    widths: list[int], k: int, rank_rows: int, experts: int | None, seed: int
) -> None:
    backend = FoldedBackend()
    weight = _weight(backend, widths, k, Draw(seed), rank_rows=rank_rows, experts=experts)
    draw = Draw(seed)
    lead = (None,) if experts is None else tuple(range(experts))
    expected = [torch.cat([draw.tensor(width, k) for width in widths]) for _ in lead]
    dense = backend.dequantize(weight)
    assert torch.equal(dense, expected[0] if experts is None else torch.stack(expected))
    rows, columns = weight.buffer.shape[-2:]
    assert rows % 8 == 0
    assert columns % 16 == 0
    assert rows >= k
    assert columns >= sum(widths) + rank_rows * len(widths)


@pytest.mark.parametrize("lookup", [False, True])
@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_adapters_come_back_as_they_were_written_and_leave_the_weight_alone(
    lookup: bool, ranks: list[int], seed: int
) -> None:
    backend, draw = FoldedBackend(), Draw(seed)
    widths = [11] if lookup else [11, 5, 5]
    weight = _weight(backend, widths, 7, draw, rank_rows=40, lookup=lookup)
    before = backend.dequantize(weight).clone()
    store = backend.allocate_adapters({"site": weight}, rank_rows=40, slots=4, device=backend.device)
    own = [_packed(weight, [rank] * len(widths), draw) for rank in ranks]
    first = 2
    for slot, (rank, packed) in enumerate(zip(ranks, own, strict=True)):
        store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=rank + 1), packed)
        first += rank + 2
    for slot, packed in enumerate(own):
        for entry in packed.entries:
            matrices = store.read("site", entry.slice, slot)
            assert matrices is not None
            assert torch.equal(matrices.a, packed.a(entry))
            assert torch.equal(matrices.b, packed.b(entry))
            assert store.true_rank("site", entry.slice, slot) == entry.rank
    assert torch.equal(backend.dequantize(weight), before)
    store.clear(0)
    assert store.read("site", 0, 0) is None
    assert store.ranges()[0] is None


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_slot_empty() -> None:
    backend, draw = FoldedBackend(), Draw(3)
    weight = _weight(backend, [6], 5, draw, rank_rows=8)
    store = backend.allocate_adapters({"site": weight}, rank_rows=8, slots=2, device=backend.device)
    fitting = _packed(weight, [3], draw)
    other = _packed(_weight(backend, [6], 4, draw), [3], draw)
    elsewhere = _packed(backend.allocate_weight(spec_of("other", [6], 5), backend.device), [3], draw)
    store.write(SlotRange(slot=0, first_rank_row=0, rank_rows=4), fitting)
    for packed, where, reason in (
        (other, SlotRange(slot=0, first_rank_row=0, rank_rows=4), "expected"),
        (elsewhere, SlotRange(slot=0, first_rank_row=0, rank_rows=4), "no such site"),
        (fitting, SlotRange(slot=0, first_rank_row=0, rank_rows=2), "rank 3 in a range of 2"),
        (fitting, SlotRange(slot=0, first_rank_row=6, rank_rows=4), "6:10 of 8"),
    ):
        with pytest.raises(OperatorError, match=reason):
            store.write(where, packed)
        assert store.read("site", 0, 0) is None
    store.write(SlotRange(slot=0, first_rank_row=0, rank_rows=4), fitting)
    with pytest.raises(OperatorError, match="overlap"):
        store.write(SlotRange(slot=1, first_rank_row=3, rank_rows=3), fitting)


def test_what_an_adapter_holds_reaches_the_rows_that_name_it_and_no_other() -> None:
    backend, draw = FoldedBackend(), Draw(8)
    weight = _weight(backend, [6, 4], 5, draw, rank_rows=8)
    store = backend.allocate_adapters({"site": weight}, rank_rows=8, slots=3, device=backend.device)
    for slot, first in ((0, 0), (1, 3)):
        packed = _packed(weight, [2, 2], draw)
        if slot == 0:
            packed.buffer.fill_(torch.nan)
        store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=3), packed)
    inputs = step_input(tokens=4, adapters={"tokens": [(0, 0, 1.0), (2, 1, 0.5)]})
    step = backend.begin_step(inputs, DeviceState(adapters=store), backend.device)
    x = draw.tensor(4, 5)
    y = backend.table()["column_linear"][0].fn(x, weight, step, "tokens")
    assert isinstance(y, torch.Tensor)
    backend.device.synchronize()
    expected = x @ backend.dequantize(weight).T
    for index, columns in ((0, slice(0, 6)), (1, slice(6, 10))):
        entry = packed.entries[index]
        expected[2, columns] += 0.5 * packed.b(entry) @ (packed.a(entry) @ x[2])
    assert y[0].isnan().all()
    assert torch.allclose(y[1:], expected[1:], atol=1e-5)


def test_quantised_weights_hold_exactly_the_canonical_values() -> None:
    backend, draw = FoldedBackend(), Draw(4)
    spec = spec_of("q", [3], 10, quantisation=Quantisation(group_size=4))
    weight = backend.allocate_weight(spec, backend.device)
    codes = torch.randint(0, 16, (3, 10), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    zeros = torch.tensor([[8, 0, 15]] * 3, dtype=torch.uint8)
    scales = draw.tensor(3, 3, dtype=torch.float16)
    weight.write_quantised(0, codes, zeros, scales)
    weight.seal()
    group = [0] * 4 + [1] * 4 + [2] * 2
    expected = (codes.int() - zeros.int()[:, group]).float() * scales.float()[:, group]
    assert torch.equal(backend.dequantize(weight), expected)


def test_a_tied_weight_takes_the_others_values_when_it_is_sealed() -> None:
    backend, draw = FoldedBackend(), Draw(5)
    table = backend.allocate_weight(spec_of("embedding", [9], 6, rank_rows=4, lookup=True), backend.device)
    head = backend.allocate_weight(spec_of("head", [9], 6, rank_rows=4, tied_to="embedding"), backend.device, table)
    for values in (draw.tensor(9, 6), draw.tensor(9, 6)):
        table.reopen()
        head.reopen()
        table.write(0, values)
        for weight in (table, head):
            weight.seal()
        assert torch.equal(backend.dequantize(head), values)
    head.reopen()
    with pytest.raises(OperatorError, match="'embedding'"):
        head.write(0, values)


# -- ordering ----------------------------------------------------------------------------------------------------------


def test_nothing_runs_before_somebody_waits_and_what_is_read_too_early_is_nan() -> None:
    backend, draw = FoldedBackend(), Draw(6)
    weight = _weight(backend, [4], 3, draw)
    linear = backend.table()["linear"][0].fn
    x = draw.tensor(2, 3)
    y = linear(x, weight)
    assert isinstance(y, torch.Tensor)
    early = y.clone()
    event = backend.device.record()
    copy = backend.device.download(y)
    assert early.isnan().all()
    assert backend.ledger.counts() == {"folded.linear": 1}
    event.synchronize()
    assert torch.allclose(y, x @ backend.dequantize(weight).T, atol=1e-5)
    assert np.array_equal(copy.wait(), y.numpy())


def test_the_device_makes_progress_while_its_events_are_asked() -> None:
    backend = FoldedBackend()
    target = torch.zeros(2)
    for value in (1.0, 2.0):
        backend.device.copy_(target, torch.full((2,), value))
    event = backend.device.record()
    backend.device.copy_(target, torch.full((2,), 3.0))
    answers = [event.query() for _ in range(3)]
    assert answers == [False, True, True]
    assert target.tolist() == [2.0, 2.0]


def test_a_failure_on_the_device_is_raised_where_somebody_waits_and_stays() -> None:
    backend = FoldedBackend()

    def broken() -> None:
        raise RuntimeError("illegal address")

    backend.queue.put(broken)
    copy = backend.device.download(torch.zeros(1))
    with pytest.raises(RuntimeError, match="illegal address"):
        copy.wait()
    for wait in (copy.wait, backend.device.synchronize):
        with pytest.raises(DeviceLost, match="illegal address"):
            wait()


def _decode(position: int, token: int, slot: int = 0) -> StepInput:
    return step_input(
        [(1, position + 1)],
        token_ids=[token],
        positions=[position],
        kv_slots=[position],
        logits_rows=[0],
        sample_slots=[slot],
        uniforms=[0.5],
    )


class Engine:
    """An embedding, sampled greedily: the next token is the row's largest column."""

    def __init__(self) -> None:
        self.backend = FoldedBackend()
        device = self.backend.device
        # Row t is largest in column t + 1.
        table = torch.eye(VOCABULARY).roll(1, dims=1)
        self.weight = self.backend.allocate_weight(spec_of("site", [VOCABULARY], VOCABULARY, lookup=True), device)
        self.weight.write(0, table)
        self.weight.seal()
        sampling = self.backend.allocate_sampling(SamplingSpec(request_slots=4, vocabulary=VOCABULARY), device)
        sampling.write(0, SamplingRow(temperature=0.0))
        spec = KVSpec(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32, blocks=2, block_size=128)
        self.state = DeviceState(kv=self.backend.allocate_kv(spec, device), sampling=sampling)

    def begin(self, inputs: StepInput) -> Step:
        return self.backend.begin_step(inputs, self.state, self.backend.device)

    def forward(self, step: Step) -> SampleOutput:
        table = self.backend.table()
        logits = table["embedding"][0].fn(self.weight, step, 0)
        output = table["sample"][0].fn(logits, self.state.sampling, step)
        assert isinstance(output, SampleOutput)
        return output


def test_a_step_that_begins_before_the_one_before_it_ran_does_not_disturb_it() -> None:
    engine = Engine()
    first = engine.begin(_decode(0, 3))
    one = engine.backend.device.download(engine.forward(first).ids)
    # Its token is the one sampled above, which nobody knows yet; both use the same buffers.
    second = engine.begin(_decode(1, -1))
    two = engine.backend.device.download(engine.forward(second).ids)
    assert first.tensor("positions").data_ptr() == second.tensor("positions").data_ptr()
    assert two.wait().tolist() == [5]
    assert one.wait().tolist() == [4]


def test_a_sampling_row_written_between_two_steps_counts_for_the_second_alone() -> None:
    engine = Engine()
    device, sampling = engine.backend.device, engine.state.sampling
    assert sampling is not None
    one = device.download(engine.forward(engine.begin(_decode(0, 3))).ids)
    sampling.write(0, SamplingRow(temperature=0.0, bias_ids=np.array([4]), bias_values=np.array([-9.0])))
    two = device.download(engine.forward(engine.begin(_decode(0, 3))).ids)
    assert (two.wait().tolist(), one.wait().tolist()) == ([0], [4])


def test_a_slot_that_is_emptied_after_a_step_was_issued_still_serves_it() -> None:
    backend, draw = FoldedBackend(), Draw(9)
    weight = _weight(backend, [6], 5, draw, rank_rows=4)
    store = backend.allocate_adapters({"site": weight}, rank_rows=4, slots=1, device=backend.device)
    packed = _packed(weight, [3], draw)
    store.write(SlotRange(slot=0, first_rank_row=1, rank_rows=3), packed)
    x = draw.tensor(1, 5)
    column_linear = backend.table()["column_linear"][0].fn
    results = []
    for _ in range(2):
        inputs = step_input(tokens=1, adapters={"tokens": [(0, 0, 1.0)]})
        step = backend.begin_step(inputs, DeviceState(adapters=store), backend.device)
        results.append(column_linear(x, weight, step, "tokens"))
        store.clear(0)
    backend.device.synchronize()
    base = x @ backend.dequantize(weight).T
    delta = x @ packed.a(packed.entries[0]).T @ packed.b(packed.entries[0]).T
    for result, expected in zip(results, (base + delta, base), strict=True):
        assert isinstance(result, torch.Tensor)
        assert torch.allclose(result, expected, atol=1e-5)


def test_a_graph_reads_the_step_it_is_replayed_with() -> None:
    engine = Engine()
    device = engine.backend.device
    example = engine.begin(_decode(0, 7))
    graph = engine.backend.capture(GraphKey(rows=1, rank_rows=0), engine.forward, example)
    assert engine.backend.ledger.counts() == {}
    copies = [device.download(graph.replay(example).ids)]
    for position, token in ((1, -1), (2, 2), (3, -1)):
        copies.append(device.download(graph.replay(engine.begin(_decode(position, token))).ids))
    assert [copy.wait().tolist() for copy in copies] == [[8], [9], [3], [4]]
    assert engine.backend.ledger.counts() == {"folded.embedding": 4, "folded.sample": 4}
    graph.close()
    with pytest.raises(OperatorError, match="closed"):
        graph.replay(example)


def test_a_graph_refuses_a_step_that_it_does_not_cover() -> None:
    engine = Engine()
    graph = engine.backend.capture(GraphKey(rows=1, rank_rows=0), engine.forward, engine.begin(_decode(0, 7)))
    with pytest.raises(OperatorError, match="on the graph"):
        graph.replay(
            engine.begin(step_input([(1, 1), (1, 1)], logits_rows=[0, 1], sample_slots=[0, 1], uniforms=[0, 0]))
        )
    with pytest.raises(OperatorError, match="not where the graph reads it"):
        graph.replay(engine.begin(step_input([(2, 2)], logits_rows=[1], sample_slots=[0], uniforms=[0])))


def test_logprobs_of_a_graph_are_handed_out_when_a_request_asks() -> None:
    engine = Engine()
    example = engine.begin(_decode(0, 7))
    graph = engine.backend.capture(GraphKey(rows=1, rank_rows=0), engine.forward, example)
    assert graph.replay(example).logprobs is None
    assert engine.state.sampling is not None
    engine.state.sampling.write(0, SamplingRow(temperature=0.0, logprobs=2))
    output = graph.replay(engine.begin(_decode(1, 7)))
    engine.backend.device.synchronize()
    assert output.logprobs is not None
    assert output.top_ids is not None
    expected = torch.log_softmax(torch.eye(VOCABULARY)[0], 0)
    assert torch.allclose(output.logprobs, expected[:1], atol=1e-6)
    assert output.top_ids[0, :2].tolist() == [8, 0]


def test_the_cache_keeps_its_own_axis_order_and_drops_padding() -> None:
    backend, draw = FoldedBackend(), Draw(7)
    spec = KVSpec(layers=2, kv_heads=3, head_dim=4, dtype=torch.float32, blocks=3, block_size=128)
    kv = backend.allocate_kv(spec, backend.device)
    k, v = draw.tensor(4, 3, 4), draw.tensor(4, 3, 4)
    slots = torch.tensor([300, -1, 5, 127])
    kv.write(1, slots, k, v)
    kept = torch.tensor([0, 2, 3])
    for got, expected in zip(kv.read(1, slots[kept]), (k, v), strict=True):
        assert torch.equal(got, expected[kept])
    kv.copy_blocks([0, 2], [1, 0])
    got, _ = kv.read(1, torch.tensor([128 + 5, 300 - 256]))
    assert torch.equal(got, k[[2, 0]])
    assert kv.read(0, slots[kept])[0].isnan().all()
    assert kv.nbytes == 3 * spec.bytes_per_block()
    with pytest.raises(OperatorError, match="block 3 of 3"):
        kv.copy_blocks([3], [0])


def test_the_parts_of_another_backend_are_refused_by_name() -> None:
    from polyaccel.backend import TableBackend

    backend, other = FoldedBackend(), TableBackend("cpu", {})
    weight = other.allocate_weight(spec_of("alien", [2], 2), other.devices()[0])
    with pytest.raises(OperatorError, match="TensorWeight of 'alien'"):
        FoldedAdapterStore({"alien": weight}, rank_rows=1, slots=1, device=backend.device)
    with pytest.raises(OperatorError, match="TensorWeight of 'alien'"):
        backend.dequantize(weight)


def test_a_router_refuses_a_bias_of_other_experts_when_it_is_called() -> None:
    backend = FoldedBackend()
    with pytest.raises(OperatorError, match="bias is not"):
        backend.table()["moe_route"][0].fn(torch.zeros(1, 9), 2, "sigmoid", False, torch.zeros(8))
