"""A device of whole numbers: its cache holds digests of what was computed, so a wrong block gives wrong tokens.

A token's "key and value" is a digest of the one before it (read from the cache through the block table), the token and
the adapters of its row. Logits are a digest of the whole context as read through the block table; sampling mixes in the
random number and the output so far. Everything the engine promises about a step is checked when it is submitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from polyaccel.backend.errors import EngineDead
from polyaccel.backend.sampling import SamplingRow
from polyaccel.backend.step import AdapterRows, StepInput, TokenClass
from polyaccel.engine.messages import Capacity, StepMessage, StepResult
from polyaccel.engine.philox import uniforms

MASK = (1 << 64) - 1
TOP = 20
Content = tuple[tuple[str, float], ...]


def digest(*parts: int) -> int:
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ (part & MASK)) * 0xBF58476D1CE4E5B9) & MASK
        value ^= value >> 29
    return value


def mix_digest(mix: Iterable[tuple[str, float]]) -> int:
    return digest(*(part for name, weight in sorted(mix) for part in (*name.encode(), int(weight * 1000))))


def choose(context: int, uniform: float, history: list[int], row: SamplingRow, vocabulary: int) -> int:
    """The sampled token, from the digest of the context."""
    token = digest(context, int(uniform * 2**24), len(history), sum(history)) % vocabulary
    if row.forbidden_ids is not None and len(history) < row.forbidden_until:
        while token in row.forbidden_ids:
            token = (token + 1) % vocabulary
    return token


class Reference:
    """One sequence alone, token by token, without blocks, batches or chunks."""

    def __init__(self, prompt: Iterable[int], mix: Content) -> None:
        self._mix = mix_digest(mix)
        self._last = 0
        self._sum = 0
        self._length = 0
        for token in prompt:
            self._push(token)

    def _push(self, token: int) -> None:
        self._last = digest(self._last, token, self._mix)
        self._length += 1
        self._sum = (self._sum + self._last * self._length) & MASK

    def generate(
        self, row: SamplingRow, choice: int, vocabulary: int, stops: Iterable[int], minimum: int, limit: int
    ) -> list[int]:
        """Output tokens: to the first stop after ``minimum`` of them, or ``limit``."""
        output: list[int] = []
        while len(output) < limit:
            uniform = 0.0
            if row.temperature > 0:
                uniform = float(uniforms(np.uint64(row.seed), np.int64(choice), np.int64(self._length)))
            token = choose(self._sum, uniform, output, row, vocabulary)
            output.append(token)
            if token in stops and len(output) > minimum:
                break
            self._push(token)
        return output


@dataclass
class Owner:
    """A sequence as the device sees it: a request slot from its begin to its end."""

    row: SamplingRow
    table: list[int] = field(default_factory=list)
    computed: int = -1
    history: list[int] = field(default_factory=list)
    sampled_ahead: bool = False


class FakeExecutor:
    """``lazy``: steps run when they are collected, otherwise as they are submitted."""

    def __init__(self, capacity: Capacity, *, lazy: bool = False) -> None:
        self.capacity = capacity
        self.lazy = lazy
        self.adapters: dict[int, str] = {}
        self.honours_min_tokens = True
        self.messages: list[StepMessage] = []
        self.in_flight: deque[tuple[StepMessage, StepResult | None, dict[int, Owner]]] = deque()
        self.fail_submit: Exception | None = None
        self.fail_collect: Exception | None = None
        self.lacks_room: Callable[[StepInput], bool] = lambda step: False
        self.skipped = 0
        self._no_room = ""
        self.owners: dict[int, Owner] = {}
        self._cache = np.zeros(capacity.kv_blocks * capacity.kv_block_size, dtype=np.uint64)
        self._last = [0] * capacity.request_slots
        self._step = 0

    # -- the executor --------------------------------------------------------------------------------------------------

    def submit(self, message: StepMessage) -> None:
        if self.fail_submit is not None:
            raise self.fail_submit
        self._step += 1
        assert message.step_id == self._step, "step ids must count up by one"
        assert len(self.in_flight) <= 1, "at most two steps may be in flight"
        for slot in message.end:
            assert slot in self.owners, f"slot {slot} ends without having begun"
            assert all(slot not in owners for _, _, owners in self.in_flight), "a slot in flight was ended"
            del self.owners[slot]
        for slot, row in message.begin:
            assert slot not in self.owners, f"slot {slot} begins twice"
            self.owners[slot] = Owner(row, history=[] if row.output_ids is None else row.output_ids.tolist())
        self._check(message.inputs)
        owners = {slot: self.owners[slot] for slot in message.inputs.request_slots.tolist()}
        self.messages.append(message)
        if message.resumes:
            self._no_room = ""
        if not self._no_room and self.lacks_room(message.inputs):
            self._no_room = f"step {message.step_id} asked for too much"
            # It came some way.
            self._cache[message.inputs.kv_slots] = 0xDEAD
        if self._no_room:
            self.skipped += 1
            nothing = StepResult(step_id=message.step_id, ids=np.zeros(0, dtype=np.int64), no_room=self._no_room)
            self.in_flight.append((message, nothing, owners))
            return
        self.in_flight.append((message, None if self.lazy else self._execute(message, owners), owners))

    def collect(self) -> StepResult:
        if self.fail_collect is not None:
            raise self.fail_collect
        message, result, owners = self.in_flight.popleft()
        return self._execute(message, owners) if result is None else result

    def slot_in_flight(self, adapter_slot: int) -> bool:
        return any(adapter_slot in message.inputs.rows("tokens").slots for message, _, _ in self.in_flight)

    # -- what a step must look like ------------------------------------------------------------------------------------

    def _check(self, step: StepInput) -> None:
        size = self.capacity.kv_block_size
        sequences, tokens = step.sequences, step.tokens
        assert tokens > 0
        wanted = {
            "token_ids": (np.int64, (tokens,)),
            "positions": (np.int64, (tokens,)),
            "query_starts": (np.int32, (sequences + 1,)),
            "context_lengths": (np.int32, (sequences,)),
            "kv_slots": (np.int64, (tokens,)),
            "request_slots": (np.int32, (sequences,)),
            "logits_rows": (np.int32, (len(step.logits_rows),)),
            "sample_slots": (np.int32, (len(step.logits_rows),)),
            "uniforms": (np.float32, (len(step.logits_rows),)),
        }
        for name, (dtype, shape) in wanted.items():
            array = getattr(step, name)
            assert array.dtype == dtype, f"{name} is {array.dtype}"
            assert array.shape == shape, f"{name} is {array.shape}, not {shape}"
        assert step.block_tables.dtype == np.int32
        assert step.block_tables.shape[0] == sequences
        assert len(set(step.request_slots.tolist())) == sequences, "a sequence occurs twice"
        assert step.query_starts[0] == 0
        assert step.query_starts[-1] == tokens
        counts = np.diff(step.query_starts)
        assert (counts > 0).all()
        pure = tokens == sequences == len(step.logits_rows)
        assert (step.token_class is TokenClass.DECODE) == pure
        ends = {int(end) - 1: slot for end, slot in zip(step.query_starts[1:], step.request_slots, strict=True)}
        assert [ends[row] for row in step.logits_rows.tolist()] == step.sample_slots.tolist()
        assert sorted(step.logits_rows.tolist()) == step.logits_rows.tolist()
        for place, slot in enumerate(step.request_slots.tolist()):
            start, end = int(step.query_starts[place]), int(step.query_starts[place + 1])
            context = int(step.context_lengths[place])
            positions = step.positions[start:end]
            assert positions.tolist() == list(range(context - (end - start), context))
            owner = self.owners[slot]
            assert owner.computed in (-1, positions[0]), "positions must go on where the last step ended"
            if owner.computed == -1:
                assert positions[0] % size == 0, "only whole blocks can be shared"
            owner.computed = context
            self._check_blocks(step, place, slot, context)
            blocks = step.block_tables[place][positions // size].astype(np.int64)
            assert step.kv_slots[start:end].tolist() == (blocks * size + positions % size).tolist()
            sources = step.token_ids[start:end]
            assert (sources[:-1] >= 0).all(), "only the last token can be unknown"
            assert sources[-1] >= 0 or (sources[-1] == -1 - slot and owner.sampled_ahead)
            owner.sampled_ahead = end - 1 in step.logits_rows
        self._check_exclusive(step)
        self._check_adapters(step)

    def _check_blocks(self, step: StepInput, place: int, slot: int, context: int) -> None:
        size = self.capacity.kv_block_size
        used = -(-context // size)
        table = step.block_tables[place]
        assert (table[used:] == 0).all(), "unused entries must be 0"
        blocks = table[:used].tolist()
        assert len(set(blocks)) == used, "a block occurs twice in one sequence"
        assert all(0 <= block < self.capacity.kv_blocks for block in blocks)
        owner = self.owners[slot]
        assert owner.table == blocks[: len(owner.table)], "a sequence's blocks must not move"
        owner.table = blocks

    def _check_exclusive(self, step: StepInput) -> None:
        size = self.capacity.kv_block_size
        written = {
            slot: set((step.kv_slots[step.query_starts[place] : step.query_starts[place + 1]] // size).tolist())
            for place, slot in enumerate(step.request_slots.tolist())
        }
        in_flight = [owner for _, _, owners in self.in_flight for owner in owners.values()]
        for slot, blocks in written.items():
            writer = self.owners[slot]
            for owner in (*self.owners.values(), *in_flight):
                assert owner is writer or not blocks.intersection(owner.table), "a block that others read is written"

    def _check_adapters(self, step: StepInput) -> None:
        tokens = self._by_row(step.rows("tokens"))
        logits = self._by_row(step.rows("logits"))
        assert all(0 <= row < step.tokens for row in tokens)
        assert logits == {place: tokens[row] for place, row in enumerate(step.logits_rows.tolist()) if row in tokens}, (
            "logits rows must carry the adapters of their tokens"
        )
        first = [min((slot for slot, _ in tokens.get(row, ())), default=-1) for row in range(step.tokens)]
        assert first == sorted(first), "rows must be ordered by adapter slot"

    def _by_row(self, rows: AdapterRows) -> dict[int, list[tuple[int, float]]]:
        assert rows.rows.dtype == rows.slots.dtype == rows.starts.dtype == rows.segment_slots.dtype == np.int32
        assert rows.weights.dtype == np.float32
        order = list(zip(rows.slots.tolist(), rows.rows.tolist(), strict=True))
        assert order == sorted(set(order)), "triples are ordered by slot, then row, each once"
        for segment, slot in enumerate(rows.segment_slots.tolist()):
            assert (rows.slots[rows.starts[segment] : rows.starts[segment + 1]] == slot).all()
        found: dict[int, list[tuple[int, float]]] = {}
        for row, slot, weight in zip(rows.rows.tolist(), rows.slots.tolist(), rows.weights.tolist(), strict=True):
            found.setdefault(row, []).append((slot, weight))
        return found

    # -- running it ----------------------------------------------------------------------------------------------------

    def _execute(self, message: StepMessage, owners: dict[int, Owner]) -> StepResult:
        step = message.inputs
        size = self.capacity.kv_block_size
        adapters = self._by_row(step.rows("tokens"))
        contexts: dict[int, int] = {}
        for place, slot in enumerate(step.request_slots.tolist()):
            table = step.block_tables[place].astype(np.int64)
            for row in range(int(step.query_starts[place]), int(step.query_starts[place + 1])):
                position = int(step.positions[row])
                source = int(step.token_ids[row])
                token = source if source >= 0 else self._last[-1 - source]
                before = 0
                if position > 0:
                    before = int(self._cache[table[(position - 1) // size] * size + (position - 1) % size])
                mix = [(self.adapters[adapter], weight) for adapter, weight in adapters.get(row, ())]
                self._cache[step.kv_slots[row]] = digest(before, token, mix_digest(mix))
            places = np.arange(int(step.context_lengths[place]))
            values = self._cache[table[places // size] * size + places % size]
            contexts[slot] = int((values * (places + 1).astype(np.uint64)).sum(dtype=np.uint64))
        rows = {slot: owner.row for slot, owner in owners.items()}
        if not self.honours_min_tokens:
            rows = {slot: replace(row, forbidden_ids=None) for slot, row in rows.items()}
        ids = [
            choose(contexts[slot], float(uniform), owners[slot].history, rows[slot], self.capacity.vocabulary)
            for slot, uniform in zip(step.sample_slots.tolist(), step.uniforms.tolist(), strict=True)
        ]
        for slot, token in zip(step.sample_slots.tolist(), ids, strict=True):
            self._last[slot] = token
            owners[slot].history.append(token)
        return self._result(message, owners, np.array(ids, dtype=np.int64))

    def _result(self, message: StepMessage, owners: dict[int, Owner], ids: np.ndarray) -> StepResult:
        if all(owner.row.logprobs < 0 for owner in owners.values()):
            return StepResult(step_id=message.step_id, ids=ids)
        return StepResult(
            step_id=message.step_id,
            ids=ids,
            logprobs=-ids.astype(np.float32),
            top_ids=ids[:, None] + np.arange(TOP),
            top_logprobs=-(ids[:, None] + np.arange(TOP)).astype(np.float32),
        )


class FakeAdapterTable:
    """``slots`` adapter slots; a mix becomes resident ``delay`` questions after it was first asked for."""

    def __init__(self, executor: FakeExecutor, slots: int, delay: int = 0) -> None:
        self._executor = executor
        self._slots = slots
        self._delay = delay
        self._where: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._asked: dict[Content, int] = {}
        self.acquired = 0

    def acquire(self, mix: Content) -> Content | None:
        missing = [name for name, _ in mix if name not in self._where]
        if missing:
            self._asked[mix] = self._asked.get(mix, 0) + 1
            if self._asked[mix] <= self._delay:
                return None
            named = {name for name, _ in mix}
            idle = [name for name in self._where if self._users[name] == 0 and name not in named]
            if self._slots - len(self._where) + len(idle) < len(missing):
                return None
            for name in missing:
                free = [slot for slot in range(self._slots) if slot not in self._where.values()]
                slot = free[0] if free else self._where.pop(idle.pop(0))
                assert not self._executor.slot_in_flight(slot), "an adapter slot in flight was given away"
                self._where[name] = slot
                self._users[name] = 0
                self._executor.adapters[slot] = name
        for name, _ in mix:
            self._users[name] += 1
        self.acquired += 1
        return tuple((self._where[name], weight) for name, weight in mix)

    def release(self, mix: Content) -> None:
        self.acquired -= 1
        for name, _ in mix:
            self._users[name] -= 1
            assert self._users[name] >= 0, f"adapter {name!r} was released more often than acquired"

    def cache_key(self, mix: Content) -> Content:
        return mix


def dead(message: str = "worker of rank 1 was killed") -> EngineDead:
    return EngineDead(message)
