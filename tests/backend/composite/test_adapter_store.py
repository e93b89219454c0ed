from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyaccel.backend.adapter_store import PackedAdapter, SlotRange
from polyaccel.backend.composite.adapter_store import TensorAdapterStore
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.errors import ConfigurationError, OperatorError
from tests.backend.composite.cases import CPU, Draw, Module, filled_weight, pack, spec_of

WEIGHTS = {
    "qkv": filled_weight(spec_of("qkv", [6, 2, 2], 5, torch.bfloat16, rank_rows=8), Draw(0)),
    "embed": filled_weight(spec_of("embed", [7], 5, torch.bfloat16, rank_rows=8, lookup=True), Draw(0)),
    "experts": filled_weight(spec_of("experts", [3, 3], 4, torch.bfloat16, rank_rows=8, experts=2), Draw(0)),
    "closed": filled_weight(spec_of("closed", [3], 4, torch.bfloat16), Draw(0)),
}
MODULES = [Module("qkv", 0, 3), Module("qkv", 2, 1), Module("embed", 0, 2), Module("experts", 1, 4, expert=1)]


def new_store() -> TensorAdapterStore:
    return TensorAdapterStore(WEIGHTS, rank_rows=8, slots=3, device=CPU)


def assert_holds(store: TensorAdapterStore, slot: int, packed: PackedAdapter) -> None:
    for entry in packed.entries:
        matrices = store.read(entry.site, entry.slice, slot, entry.expert)
        assert matrices is not None
        assert torch.equal(matrices.a, packed.a(entry))
        assert torch.equal(matrices.b, packed.b(entry))
        assert store.true_rank(entry.site, entry.slice, slot, entry.expert) == entry.rank


def test_what_was_written_is_read_back_in_canonical_form() -> None:
    store, packed = new_store(), pack(WEIGHTS, MODULES, Draw(1))
    where = SlotRange(slot=2, first_rank_row=3, rank_rows=5)
    event = store.write(where, packed)
    event.synchronize()
    assert event.query()
    assert_holds(store, 2, packed)
    assert list(store.ranges()) == [None, None, where]
    assert store.read("qkv", 1, 2) is None
    assert store.read("experts", 1, 2, 0) is None
    assert store.read("qkv", 0, 0) is None
    assert store.true_rank("experts", 0, 2, 1) == 0


def test_rows_of_the_range_that_nothing_fills_are_zero() -> None:
    store = new_store()
    for buffers in store.sites.values():
        for buffer in (buffers.a, *buffers.b):
            buffer.fill_(torch.nan)
    store.write(SlotRange(slot=0, first_rank_row=2, rank_rows=5), pack(WEIGHTS, MODULES, Draw(1)))
    filled = {(m.site, m.slice, m.expert): m.rank for m in MODULES}
    for site, buffers in store.sites.items():
        experts = WEIGHTS[site].spec.experts
        for i in range(len(buffers.b)):
            for expert in (None,) if experts is None else range(experts):
                rank = filled.get((site, i, expert), 0)
                for rows in buffers.rows(i, expert, 2, 5):
                    assert not rows[:rank].isnan().any()
                    assert not rows[rank:].any()
                for rows in buffers.rows(i, expert, 0, 2):
                    assert rows.isnan().all()


def test_a_slot_keeps_its_addresses_and_loses_its_old_content_when_it_is_replaced() -> None:
    store = new_store()
    store.write(SlotRange(slot=0, first_rank_row=0, rank_rows=4), pack(WEIGHTS, MODULES, Draw(1)))
    before = store.sites["qkv"].a.data_ptr()
    other = pack(WEIGHTS, [Module("qkv", 1, 2)], Draw(2))
    store.write(SlotRange(slot=0, first_rank_row=1, rank_rows=2), other)
    assert store.sites["qkv"].a.data_ptr() == before
    assert_holds(store, 0, other)
    assert store.read("qkv", 0, 0) is None


def test_slots_do_not_touch_each_other() -> None:
    store = new_store()
    first, second = pack(WEIGHTS, MODULES, Draw(1)), pack(WEIGHTS, MODULES, Draw(2))
    store.write(SlotRange(slot=0, first_rank_row=0, rank_rows=4), first)
    store.write(SlotRange(slot=1, first_rank_row=4, rank_rows=4), second)
    assert_holds(store, 0, first)
    assert_holds(store, 1, second)
    store.clear(0)
    assert store.ranges()[0] is None
    assert store.read("qkv", 0, 0) is None
    assert store.true_rank("qkv", 0, 0) == 0
    assert_holds(store, 1, second)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"site": "nowhere"}, "no such site"),
        ({"site": "closed"}, "without room"),
        ({"slice": 3}, "3 slices"),
        ({"expert": 0}, "None experts"),
        ({"kind": "embedding"}, "lookup=False"),
        ({"rank": 6}, "rank 6"),
        ({"rank": 0}, "rank 0"),
        ({"a_shape": (3, 4)}, "expected"),
        ({"b_shape": (5, 3)}, "expected"),
        ({"b_offset": 10**9}, "buffer of"),
        ({"a_offset": -1}, "buffer of"),
    ],
)
def test_a_bad_entry_is_refused_by_site_and_leaves_the_slot_empty(change: dict[str, object], reason: str) -> None:
    store, packed = new_store(), pack(WEIGHTS, MODULES, Draw(1))
    where = SlotRange(slot=1, first_rank_row=0, rank_rows=5)
    store.write(where, packed)
    content = [t.clone() for buffers in store.sites.values() for t in (buffers.a, *buffers.b)]
    bad = replace(packed.entries[0], **change)  # type: ignore[arg-type]
    with pytest.raises(OperatorError, match=reason) as caught:
        store.write(where, replace(packed, entries=(*packed.entries[1:], bad)))
    assert repr(bad.site) in str(caught.value)
    assert store.ranges()[1] is None
    assert store.read("qkv", 2, 1) is None
    after = [t for buffers in store.sites.values() for t in (buffers.a, *buffers.b)]
    assert all(torch.equal(a, b) for a, b in zip(after, content, strict=True))


def test_a_module_that_appears_twice_is_refused() -> None:
    packed = pack(WEIGHTS, [Module("qkv", 0, 3), Module("qkv", 0, 3)], Draw(1))
    with pytest.raises(OperatorError, match="twice"):
        new_store().write(SlotRange(slot=0, first_rank_row=0, rank_rows=4), packed)


@pytest.mark.parametrize(("slot", "first", "rows"), [(3, 0, 4), (-1, 0, 4), (0, 6, 4), (0, -1, 4), (0, 2, 4)])
def test_a_range_outside_the_store_or_on_another_slot_is_refused(slot: int, first: int, rows: int) -> None:
    store = new_store()
    store.write(SlotRange(slot=1, first_rank_row=5, rank_rows=3), pack(WEIGHTS, [Module("qkv", 0, 3)], Draw(1)))
    with pytest.raises(OperatorError):
        store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=rows), pack(WEIGHTS, [], Draw(1)))
    assert store.ranges()[1] is not None


def test_a_buffer_of_another_dtype_is_rounded_into_the_store() -> None:
    weights = {"w": TensorWeight(spec_of("w", [2], 2, rank_rows=2), CPU)}
    packed = pack(weights, [Module("w", 0, 1)], Draw(3))
    narrow = TensorWeight(spec_of("w", [2], 2, torch.bfloat16, rank_rows=2), CPU)
    store = TensorAdapterStore({"w": narrow}, rank_rows=2, slots=1, device=CPU)
    store.write(SlotRange(slot=0, first_rank_row=0, rank_rows=1), packed)
    matrices = store.read("w", 0, 0)
    assert matrices is not None
    assert torch.equal(matrices.b, packed.b(packed.entries[0]).bfloat16())


def test_bytes_count_the_buffers_of_sites_with_room() -> None:
    qkv, embed, experts = 3 * 8 * 5 + 8 * 10, 8 * 7 + 8 * 5, 2 * (2 * 8 * 4 + 8 * 6)
    assert new_store().nbytes == 2 * (qkv + embed + experts)


def test_an_embedding_table_of_several_slices_is_refused() -> None:
    weight = TensorWeight(spec_of("embed", [2, 2], 2, lookup=True, rank_rows=1), CPU)
    with pytest.raises(ConfigurationError, match="slices"):
        TensorAdapterStore({"embed": weight}, rank_rows=1, slots=1, device=CPU)


def test_a_store_may_have_no_rows_and_a_range_may_have_none() -> None:
    assert TensorAdapterStore(WEIGHTS, rank_rows=0, slots=0, device=CPU).nbytes == 0
    store = new_store()
    nothing = SlotRange(slot=0, first_rank_row=3, rank_rows=0)
    store.write(nothing, pack(WEIGHTS, [], Draw(1)))
    assert store.ranges()[0] == nothing


def test_an_expert_after_the_last_one_is_refused() -> None:
    good = pack(WEIGHTS, [Module("experts", 1, 4, expert=1)], Draw(1))
    wrong = replace(good, entries=(replace(good.entries[0], expert=2),))
    with pytest.raises(OperatorError, match="2 experts"):
        new_store().write(SlotRange(slot=0, first_rank_row=0, rank_rows=4), wrong)
