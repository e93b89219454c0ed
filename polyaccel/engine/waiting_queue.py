"""Sequences that wait for a request slot, by priority and arrival; those whose adapters are not resident set aside."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from polyaccel.engine.request import Sequence
from polyaccel.lora.mix import AdapterMix

Entry = tuple[tuple[int, int], Sequence]


@dataclass(slots=True)
class _Parked:
    since: int
    entries: list[Entry] = field(default_factory=list)


class WaitingQueue:
    """A heap with lazy removal: adding, removing and taking cost O(log n), whatever is queued.

    ``patience`` is how many requests with other adapters may be admitted past the mix that was parked first; then that
    mix is :attr:`starving`.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._heap: list[Entry] = []
        self._parked: dict[AdapterMix, _Parked] = {}
        self._turns: deque[AdapterMix] = deque()
        self._waiting = 0
        self._entries = 0
        self._admitted = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, sequence: Sequence) -> None:
        sequence.queued = True
        self._waiting += 1
        self._entries += 1
        heappush(self._heap, (sequence.order, sequence))

    def discard(self, sequence: Sequence) -> None:
        """Take a queued sequence out, wherever it is. It must not be pushed again."""
        sequence.queued = False
        self._waiting -= 1
        if self._entries > 2 * self._waiting + 64:
            self._compact()

    def peek(self) -> Sequence | None:
        """The sequence that is served next; None when the rest is parked."""
        heap = self._heap
        while heap and not heap[0][1].queued:
            heappop(heap)
            self._entries -= 1
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Take out the sequence that :meth:`peek` returned, to be admitted."""
        sequence = heappop(self._heap)[1]
        sequence.queued = False
        self._waiting -= 1
        self._entries -= 1
        if sequence.request.mix:
            self._admitted += 1

    def is_parked(self, mix: AdapterMix) -> bool:
        return mix in self._parked

    def park(self) -> None:
        """Set the sequence that :meth:`peek` returned aside, until its mix is unparked."""
        entry = heappop(self._heap)
        mix = entry[1].request.mix
        parked = self._parked.get(mix)
        if parked is None:
            parked = self._parked[mix] = _Parked(self._admitted)
            self._turns.append(mix)
        heappush(parked.entries, entry)

    def turn(self, count: int) -> list[Sequence]:
        """The oldest sequence of each of the next ``count`` parked mixes, in rotation; of the starving mix alone."""
        starving = self.starving
        if starving is not None:
            mixes = [starving]
        else:
            mixes = [self._turns[index] for index in range(min(count, len(self._turns)))]
            self._turns.rotate(-len(mixes))
        heads = [self._head(mix) for mix in mixes]
        return [head for head in heads if head is not None]

    def unpark(self, mix: AdapterMix) -> None:
        """Everything that waits for this mix goes back to its place in the queue."""
        entries = self._parked.pop(mix).entries
        self._turns.remove(mix)
        for entry in entries:
            heappush(self._heap, entry)

    @property
    def starving(self) -> AdapterMix | None:
        """The mix that has been passed over long enough: no other adapters are admitted before it is."""
        first = next(iter(self._parked.items()), None)
        if first is None or self._admitted - first[1].since <= self._patience:
            return None
        return first[0]

    def _head(self, mix: AdapterMix) -> Sequence | None:
        entries = self._parked[mix].entries
        while entries and not entries[0][1].queued:
            heappop(entries)
            self._entries -= 1
        if not entries:
            self.unpark(mix)
            return None
        return entries[0][1]

    def _compact(self) -> None:
        self._heap = [entry for entry in self._heap if entry[1].queued]
        heapify(self._heap)
        for mix, parked in list(self._parked.items()):
            parked.entries = [entry for entry in parked.entries if entry[1].queued]
            heapify(parked.entries)
            if not parked.entries:
                self.unpark(mix)
        self._entries = len(self._heap) + sum(len(parked.entries) for parked in self._parked.values())
