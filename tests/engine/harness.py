"""An engine core on the fake executor, and what its requests must answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyaccel.backend.sampling import SamplingRow
from polyaccel.engine.core import EngineCore
from polyaccel.engine.events import FinishEvent, StepEvents
from polyaccel.engine.messages import Capacity
from polyaccel.engine.sampling_params import SamplingParams
from tests.engine.fake_executor import Content, FakeAdapterTable, FakeExecutor, Reference

VOCABULARY = 97
EOS = (5, 11)


def capacity(**changes: int) -> Capacity:
    values = {
        "kv_blocks": 64,
        "kv_block_size": 4,
        "request_slots": 8,
        "max_model_len": 64,
        "vocabulary": VOCABULARY,
        "adapter_slots": 4,
        "rank_rows": 64,
        "world_size": 1,
    }
    return Capacity(**(values | changes))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, size=length).tolist()


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    params: SamplingParams
    mix: Content


class Engine:
    """A core with everything it was asked and answered."""

    def __init__(
        self,
        *,
        room: Capacity | None = None,
        overlap: bool = True,
        lazy: bool = False,
        budget: int = 32,
        prefix_caching: bool = True,
        adapter_delay: int = 0,
    ) -> None:
        room = room or capacity()
        self.executor = FakeExecutor(room, lazy=lazy)
        self.adapters = FakeAdapterTable(self.executor, room.adapter_slots, adapter_delay)
        self.ticks = 0.0
        self.core = EngineCore(
            self.executor,  # type: ignore[arg-type]
            self.adapters,
            eos_token_ids=EOS,
            overlap=overlap,
            max_batched_tokens=budget,
            prefix_caching=prefix_caching,
            clock=self._tick,
        )
        self.asked: dict[str, Asked] = {}
        self.finished: dict[tuple[str, int], FinishEvent] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.steps: list[StepEvents] = []

    def _tick(self) -> float:
        self.ticks += 1.0
        return self.ticks

    def add(
        self,
        request_id: str,
        prompt: list[int],
        mix: Content = (),
        *,
        priority: int = 0,
        watched: bool = False,
        **params: object,
    ) -> None:
        values = {"temperature": 0.0} | params
        asked = SamplingParams(**values)  # type: ignore[arg-type]
        self.core.add_request(request_id, prompt, asked, mix, priority=priority, watched=watched)
        self.asked[request_id] = Asked(prompt, asked, mix)

    def step(self) -> StepEvents:
        events = self.core.step()
        self.steps.append(events)
        for token in events.tokens:
            key = token.request_id, token.choice
            assert key not in self.finished, "a token after the end"
            self.tokens.setdefault(key, []).append(token.token_id)
        self.note(events.finished)
        return events

    def note(self, events: list[FinishEvent]) -> None:
        for event in events:
            key = event.request_id, event.choice
            assert key not in self.finished, f"{key} finished twice"
            self.finished[key] = event

    def abort(self, request_id: str) -> None:
        self.note(self.core.abort(request_id))

    def run(self, limit: int = 2000) -> Engine:
        for _ in range(limit):
            if not self.core.has_work:
                return self
            self.step()
        raise AssertionError(f"not done after {limit} steps: {self.core.stats()}")

    def output(self, request_id: str, choice: int = 0) -> list[int]:
        return self.finished[request_id, choice].token_ids.tolist()

    def expected(self, request_id: str, choice: int = 0) -> list[int]:
        """What the request answers when it is alone. Its seed must have been given."""
        asked = self.asked[request_id]
        params = asked.params
        stops = (() if params.ignore_eos else EOS) + params.stop_ids
        row = SamplingRow(
            temperature=params.temperature,
            seed=params.seed or 0,
            forbidden_ids=np.array(stops) if params.min_tokens and stops else None,
            forbidden_until=params.min_tokens,
        )
        limit = self.core.max_tokens - len(asked.prompt) if params.max_tokens is None else params.max_tokens
        reference = Reference(asked.prompt, asked.mix)
        return reference.generate(row, choice, VOCABULARY, stops, params.min_tokens, limit)

    def check_answers(self) -> None:
        """Every request ended once for each choice; the tokens are those it answers alone, or their beginning."""
        for request_id, asked in self.asked.items():
            for choice in range(asked.params.n):
                event = self.finished[request_id, choice]
                expected = self.expected(request_id, choice)
                output = event.token_ids.tolist()
                if event.reason in ("stop", "length"):
                    assert output == expected, f"{request_id} choice {choice}"
                else:
                    assert output == expected[: len(output)], f"{request_id} choice {choice}"
                if (request_id, choice) in self.tokens:
                    assert self.tokens[request_id, choice] == output

    def check_nothing_is_held(self) -> None:
        """Blocks, slots and adapters are all free."""
        stats = self.core.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert not self.executor.in_flight
        assert self.adapters.acquired == 0
