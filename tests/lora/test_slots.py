from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.errors import AdapterError, AdapterNotFound, ConfigurationError
from polyaccel.lora.slots import SlotAllocator

SLOTS, ROWS = 4, 24
NAMES = st.sampled_from([f"adapter-{i}" for i in range(7)])


class SlotMachine(RuleBasedStateMachine):
    """The allocator beside a plain dictionary of what should be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SlotAllocator(SLOTS, ROWS)
        self.twin = SlotAllocator(SLOTS, ROWS)
        self.model: dict[str, dict[str, int]] = {}
        self.order: list[str] = []
        self.generations: list[int] = []

    def touch(self, name: str) -> None:
        if name in self.order:
            self.order.remove(name)
        self.order.append(name)

    def both(self, method: str, *arguments: object) -> object:
        outcomes = []
        for allocator in (self.allocator, self.twin):
            try:
                outcomes.append(getattr(allocator, method)(*arguments))
            except AdapterError as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1], "two allocators that saw the same calls disagree"
        return outcomes[0]

    def fits(self, rows: int, without: tuple[str, ...] = ()) -> bool:
        left = [name for name in self.model if name not in without]
        free = set(range(ROWS))
        for name in left:
            where = self.allocator.get(name).where
            free -= set(range(where.first_rank_row, where.first_rank_row + where.rank_rows))
        return len(left) < SLOTS and any(
            free.issuperset(range(start, start + rows)) for start in range(ROWS - rows + 1)
        )

    @rule(name=NAMES, rows=st.integers(1, 12))
    def allocate(self, name: str, rows: int) -> None:
        possible = name not in self.model and self.fits(rows)
        outcome = self.both("allocate", name, rows)
        assert isinstance(outcome, SlotRange) == possible
        if isinstance(outcome, SlotRange):
            assert outcome.rank_rows == rows
            self.model[name] = {"pinned": 0, "users": 0, "rows": rows}
            self.generations.append(self.allocator.get(name).generation)
            self.touch(name)

    @rule(name=NAMES)
    def free(self, name: str) -> None:
        entry = self.model.get(name)
        freed = entry is not None and not entry["pinned"] and not entry["users"]
        assert isinstance(self.both("free", name), SlotRange) == freed
        if freed:
            del self.model[name]
            self.order.remove(name)

    @rule(name=NAMES)
    def acquire(self, name: str) -> None:
        self.both("acquire", name)
        if name in self.model:
            self.model[name]["users"] += 1
            self.touch(name)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.both("release", name)
        if name in self.model:
            self.model[name]["users"] = max(self.model[name]["users"] - 1, 0)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self.both("pin" if pinned else "unpin", name)
        if name in self.model:
            self.model[name]["pinned"] = int(pinned)

    @precondition(lambda self: self.model)
    @rule(rows=st.integers(1, ROWS), name=NAMES)
    def evict_and_allocate(self, rows: int, name: str) -> None:
        plan = self.both("plan_eviction", rows)
        idle = tuple(n for n in self.order if not self.model[n]["pinned"] and not self.model[n]["users"])
        if plan is None:
            assert not self.fits(rows, idle)
            return
        assert isinstance(plan, tuple)
        assert [n for n in idle if n in plan] == list(plan), "victims are idle and least recently used first"
        assert self.fits(rows, plan)
        for spared in plan:
            assert not self.fits(rows, tuple(n for n in plan if n != spared)), f"{spared} was evicted in vain"
        for victim in plan:
            self.free(victim)
        if name not in self.model:
            self.allocate(name, rows)
            assert name in self.model

    @invariant()
    def slots_and_rows_are_accounted_and_never_shared(self) -> None:
        assert {adapter.name for adapter in self.allocator.loaded()} == set(self.model)
        slots = [adapter.where.slot for adapter in self.allocator.loaded()]
        assert len(set(slots)) == len(slots)
        taken: list[int] = []
        for adapter in self.allocator.loaded():
            where = adapter.where
            assert 0 <= where.slot < SLOTS
            assert where.first_rank_row + where.rank_rows <= ROWS
            taken += range(where.first_rank_row, where.first_rank_row + where.rank_rows)
            assert (adapter.pinned, adapter.users) == (
                bool(self.model[adapter.name]["pinned"]),
                self.model[adapter.name]["users"],
            )
        assert len(set(taken)) == len(taken)
        assert self.allocator.free_rank_rows == ROWS - len(taken)

    @invariant()
    def generations_are_never_repeated(self) -> None:
        assert len(set(self.generations)) == len(self.generations)

    @invariant()
    def candidates_are_idle_and_in_order_of_use(self) -> None:
        idle = [n for n in self.order if not self.model[n]["pinned"] and not self.model[n]["users"]]
        assert list(self.allocator.eviction_candidates()) == idle


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(deadline=None, stateful_step_count=40, max_examples=60)


def test_slots_and_rows_are_taken_first_fit() -> None:
    allocator = SlotAllocator(3, 32)
    assert allocator.allocate("a", 8) == SlotRange(slot=0, first_rank_row=0, rank_rows=8)
    assert allocator.allocate("b", 8) == SlotRange(slot=1, first_rank_row=8, rank_rows=8)
    allocator.free("a")
    assert allocator.allocate("c", 16) == SlotRange(slot=0, first_rank_row=16, rank_rows=16)
    assert allocator.allocate("d", 8) == SlotRange(slot=2, first_rank_row=0, rank_rows=8)
    assert "d" in allocator
    assert len(allocator) == 3


def test_a_reload_of_the_same_name_gets_a_new_generation() -> None:
    allocator = SlotAllocator(1, 8)
    allocator.allocate("a", 8)
    first = allocator.get("a").generation
    allocator.free("a")
    allocator.allocate("a", 8)
    assert allocator.get("a").generation > first


def test_want_of_room_names_what_is_free_and_the_options() -> None:
    allocator = SlotAllocator(2, 16)
    allocator.allocate("a", 12)
    with pytest.raises(AdapterError, match=r"8 contiguous rank rows.*1 of 2 slots and 4 of 16") as caught:
        allocator.allocate("b", 8)
    assert "adapter_rank_rows" in str(caught.value)
    allocator.allocate("b", 4)
    with pytest.raises(AdapterError, match="0 of 2 slots"):
        allocator.allocate("c", 1)


@pytest.mark.parametrize("rows", [0, -1, 17])
def test_a_request_that_can_never_fit_is_refused_with_both_sizes(rows: int) -> None:
    with pytest.raises(AdapterError, match=rf"needs {rows} rank rows, the engine has 16"):
        SlotAllocator(2, 16).allocate("a", rows)


def test_an_adapter_in_use_or_pinned_is_not_freed() -> None:
    allocator = SlotAllocator(2, 16)
    allocator.allocate("a", 8)
    allocator.acquire("a")
    with pytest.raises(AdapterError, match="in use by 1 running"):
        allocator.free("a")
    assert allocator.plan_eviction(16) is None
    allocator.release("a")
    allocator.pin("a")
    with pytest.raises(AdapterError, match="pinned"):
        allocator.free("a")
    allocator.unpin("a")
    assert allocator.plan_eviction(16) == ("a",)
    assert allocator.free("a").rank_rows == 8


def test_releasing_more_often_than_acquiring_is_an_error() -> None:
    allocator = SlotAllocator(1, 8)
    allocator.allocate("a", 8)
    with pytest.raises(AdapterError, match="more often"):
        allocator.release("a")


@pytest.mark.parametrize("method", ["get", "free", "acquire", "release", "pin", "unpin"])
def test_an_unknown_name_is_not_found_and_the_loaded_ones_are_listed(method: str) -> None:
    allocator = SlotAllocator(1, 8)
    allocator.allocate("pirate", 8)
    with pytest.raises(AdapterNotFound, match=r"'x' is not loaded; loaded are: 'pirate'"):
        getattr(allocator, method)("x")


def test_a_name_is_loaded_once_and_never_empty() -> None:
    allocator = SlotAllocator(2, 16)
    allocator.allocate("a", 8)
    with pytest.raises(AdapterError, match="loaded already"):
        allocator.allocate("a", 8)
    with pytest.raises(AdapterError, match="needs a name"):
        allocator.allocate("", 8)


@pytest.mark.parametrize(("slots", "rows"), [(0, 8), (8, 0), (-1, -1)])
def test_an_allocator_without_room_is_a_configuration_error(slots: int, rows: int) -> None:
    with pytest.raises(ConfigurationError, match="adapter_slots"):
        SlotAllocator(slots, rows)
