"""Order, removal and setting aside."""

from __future__ import annotations

import numpy as np

from polyaccel.engine.request import Request, Sequence
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.engine.waiting_queue import WaitingQueue
from polyaccel.lora.mix import AdapterMix

A: AdapterMix = (("a", 1.0),)
B: AdapterMix = (("b", 1.0),)


def sequence(serial: int, mix: AdapterMix = (), priority: int = 0) -> Sequence:
    request = Request(
        id=str(serial),
        prompt=np.zeros(1, dtype=np.int32),
        params=SamplingParams(),
        mix=mix,
        priority=priority,
        serial=serial,
        limit=2,
        stop_ids=np.zeros(0, dtype=np.int64),
        seed=0,
        watched=False,
        arrived=0.0,
        open=1,
    )
    return Sequence(request=request, choice=0, tokens=request.prompt)


def drained(queue: WaitingQueue) -> list[str]:
    names = []
    while (head := queue.peek()) is not None:
        names.append(head.request.id)
        queue.pop()
    return names


def test_priority_comes_before_arrival_and_a_returning_sequence_keeps_its_place() -> None:
    queue = WaitingQueue(patience=8)
    for serial, priority in ((3, 0), (1, 1), (2, 0), (4, -1)):
        queue.push(sequence(serial, priority=priority))
    assert drained(queue) == ["4", "2", "3", "1"]
    assert len(queue) == 0


def test_a_discarded_sequence_is_skipped_wherever_it_waits() -> None:
    queue = WaitingQueue(patience=8)
    plain, parked = sequence(1), sequence(0, A)
    for entry in (plain, parked, sequence(2), sequence(3, A)):
        queue.push(entry)
    assert queue.peek() is parked
    queue.park()
    queue.discard(plain)
    queue.discard(parked)
    assert len(queue) == 2
    assert [head.request.id for head in queue.turn(4)] == []
    assert drained(queue) == ["2", "3"]


def test_removal_does_not_let_dead_entries_pile_up() -> None:
    queue = WaitingQueue(patience=8)
    queue.push(sequence(0))
    for serial in range(1, 5000):
        entry = sequence(serial)
        queue.push(entry)
        queue.discard(entry)
    assert len(queue._heap) < 200
    assert drained(queue) == ["0"]


def test_parked_mixes_take_turns_and_return_to_their_place() -> None:
    queue = WaitingQueue(patience=8)
    for serial, mix in enumerate((A, B, A, (), B)):
        queue.push(sequence(serial, mix))
    while (head := queue.peek()) is not None and head.request.mix:
        queue.park()
    assert head is not None
    assert [queue.turn(1)[0].request.id for _ in range(3)] == ["0", "1", "0"]
    assert [entry.request.id for entry in queue.turn(5)] == ["1", "0"]
    queue.unpark(A)
    assert not queue.is_parked(A)
    assert queue.is_parked(B)
    assert drained(queue) == ["0", "2", "3", "4"]
    assert len(queue) == 1


def test_a_mix_that_is_passed_over_too_often_is_starving() -> None:
    queue = WaitingQueue(patience=3)
    queue.push(sequence(0, A))
    queue.peek()
    queue.park()
    for serial in range(1, 6):
        assert queue.starving == (A if serial == 5 else None)
        queue.push(sequence(serial, B))
        queue.push(sequence(100 + serial))
        queue.peek()
        queue.pop()
        queue.peek()
        queue.pop()
    assert [entry.request.id for entry in queue.turn(8)] == ["0"]
