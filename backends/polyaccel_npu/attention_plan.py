"""How a step's sequences become calls of FIA; found once a step, on the host, which keeps the lists it wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from polyaccel.backend import StepInput


@dataclass(frozen=True, slots=True)
class Call:
    """One call of FIA: query rows ``begin:end`` of sequences ``first:last``, which see ``lengths`` keys each.

    ``last - first`` is 1 for a sequence that is prefilled; else each sequence has one query.
    """

    begin: int
    end: int
    first: int
    last: int
    lengths: tuple[int, ...]

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one query."""
        return self.end - self.begin == self.last - self.first


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Calls in order of their rows. Rows of none give zeros: they belong to no sequence or see no key."""

    calls: tuple[Call, ...]
    tokens: int

    @property
    def covered(self) -> bool:
        """Whether the calls' rows are all rows."""
        return sum(call.end - call.begin for call in self.calls) == self.tokens

    def gaps(self) -> Iterator[tuple[int, Call | None]]:
        """How many rows of zeros come before each call; the last has none after it."""
        at = 0
        for call in self.calls:
            yield call.begin - at, call
            at = call.end
        yield self.tokens - at, None


@dataclass(frozen=True, slots=True)
class KeyRoom:
    """What FIA allows a call with paged keys: no more blocks, those of all its sequences counted, than the cache has.
    A block that several sequences share counts for each (its document, page attention)."""

    block_size: int
    blocks: int

    def of(self, context: int) -> int:
        """Blocks of a sequence."""
        return -(-context // self.block_size)

    def takes(self, contexts: Iterable[int]) -> bool:
        """Whether one call takes sequences of these lengths."""
        return sum(self.of(context) for context in contexts) <= self.blocks


def plan_attention(inputs: StepInput, room: KeyRoom | None = None) -> AttentionPlan:
    """Runs of sequences with one query go into one call, or as few as ``room`` allows; every other sequence has its
    own."""
    starts = inputs.query_starts.tolist()
    contexts = inputs.context_lengths.tolist()
    calls: list[Call] = []
    sequence = 0
    while sequence < len(contexts):
        begin, end = starts[sequence], starts[sequence + 1]
        if end - begin == 1 and contexts[sequence] > 0:
            last, blocks = sequence + 1, 0 if room is None else room.of(contexts[sequence])
            while last < len(contexts) and starts[last + 1] - starts[last] == 1 and contexts[last] > 0:
                if room is not None:
                    blocks += room.of(contexts[last])
                    if blocks > room.blocks:
                        break
                last += 1
            calls.append(Call(begin, starts[last], sequence, last, tuple(contexts[sequence:last])))
            sequence = last
            continue
        # The last queries of a sequence are the last keys: those before the first key see nothing.
        visible = min(end - begin, contexts[sequence])
        if visible > 0:
            calls.append(Call(end - visible, end, sequence, sequence + 1, (contexts[sequence],)))
        sequence += 1
    return AttentionPlan(tuple(calls), inputs.tokens)
