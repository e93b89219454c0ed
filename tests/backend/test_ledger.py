"""The ledger: what ran, captured and replayed, and which call it ran in."""

from __future__ import annotations

import pytest

from polyaccel.backend import Ledger
from polyaccel.backend.ledger import COPY_PREFIX


def test_launches_are_counted_in_the_order_of_their_first() -> None:
    ledger = Ledger()
    for kernel in ("b", "a", "b"):
        ledger.record(kernel)
    ledger.record("a", 3)
    assert list(ledger.counts().items()) == [("b", 2), ("a", 4)]


def test_counts_are_a_copy() -> None:
    ledger = Ledger()
    ledger.record("a")
    ledger.counts()["a"] = 100
    assert ledger.counts() == {"a": 1}


def test_a_capture_holds_its_launches_back_and_every_replay_adds_them() -> None:
    ledger = Ledger()
    ledger.record("before")
    with ledger.capture() as delta:
        ledger.record("a", 2)
        assert ledger.counts() == {"a": 2}
    assert delta == {"a": 2}
    assert ledger.counts() == {"before": 1}
    for _ in range(3):
        ledger.add(delta)
    assert ledger.counts() == {"before": 1, "a": 6}


def test_captures_nest_and_an_inner_one_is_not_part_of_the_outer() -> None:
    ledger = Ledger()
    with ledger.capture() as outer:
        ledger.record("a")
        with ledger.capture() as inner:
            ledger.record("b")
    assert (outer, inner, ledger.counts()) == ({"a": 1}, {"b": 1}, {})


def test_a_failed_capture_restores_the_counts_and_tells_what_ran() -> None:
    ledger = Ledger()
    ledger.record("before")
    held: list[dict[str, int]] = []

    def fail() -> None:
        with ledger.capture() as delta:
            held.append(delta)
            ledger.record("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert held == [{"a": 1}]
    assert ledger.counts() == {"before": 1}


def _where(ledger: Ledger) -> tuple[str | None, bool]:
    return ledger.native, ledger.inside_operator


def test_the_innermost_native_call_is_known() -> None:
    ledger = Ledger()
    seen = [_where(ledger)]
    for call in ("outer", None, "inner"):
        ledger.enter(call)
        seen.append(_where(ledger))
    for call in ("inner", None, "outer"):
        ledger.leave(call)
        seen.append(_where(ledger))
    outside, outer, inner = (None, False), ("outer", True), ("inner", True)
    assert seen == [outside, outer, outer, inner, outer, outer, outside]


def test_composites_and_copies_are_told_apart_from_kernels() -> None:
    ledger = Ledger()
    for kernel in ("sgmv", "composite.rms_norm", "nested_composite.rms_norm", f"{COPY_PREFIX}linear.x"):
        ledger.record(kernel)
    assert list(ledger.composites()) == ["composite.rms_norm", "nested_composite.rms_norm"]
    assert ledger.copies() == {"copy.linear.x": 1}
    ledger.clear()
    assert ledger.counts() == {}
