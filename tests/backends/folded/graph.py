"""A captured decode step: the calls that its kernels queued, over buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyaccel.backend import Collective, Communicator, Graph, GraphKey, Ledger, OperatorError, SampleOutput, Step

from .sampling_state import FoldedSamplingState
from .step import FoldedStep
from .work_queue import Call, Queue


class FoldedGraph(Graph):
    """Replaying queues the recorded calls again, and adds launches and collectives as if they had been issued."""

    def __init__(
        self,
        key: GraphKey,
        example: FoldedStep,
        output: SampleOutput,
        *,
        calls: Sequence[Call],
        launches: Mapping[str, int],
        collectives: Sequence[Collective],
    ) -> None:
        self.key = key
        self._example, self._output = example, output
        self._calls, self._launches, self._collectives = calls, dict(launches), collectives
        self._queue: Queue | None = None
        self._ledger: Ledger
        self._communicator: Communicator | None = None

    def attach(self, queue: Queue, ledger: Ledger, communicator: Communicator | None) -> None:
        """Where replays go."""
        self._queue, self._ledger, self._communicator = queue, ledger, communicator

    def replay(self, step: Step) -> SampleOutput:
        if self._queue is None:
            raise OperatorError("replay", f"the graph {self.key} is closed")
        self._check(step)
        self._ledger.add(self._launches)
        if self._communicator is not None and self._communicator.trace is not None:
            self._communicator.trace += self._collectives
        self._queue.put_all(self._calls)
        state = step.state.sampling
        if isinstance(state, FoldedSamplingState) and state.wants_logprobs(step.input.sample_slots):
            return self._output
        return SampleOutput(ids=self._output.ids)

    def close(self) -> None:
        self._queue = None
        self._calls = ()

    def _check(self, step: Step) -> None:
        example = self._example
        if not isinstance(step, FoldedStep) or step.buffers is not example.buffers:
            raise OperatorError("replay", "the step's metadata is not where the graph reads it")
        rows = (step.extent.tokens, step.extent.sequences, step.extent.rows)
        if rows != (example.extent.tokens, example.extent.sequences, example.extent.rows):
            raise OperatorError("replay", f"a step of {rows} tokens, sequences and rows on the graph {self.key}")
        if step.rank_rows > example.rank_rows:
            raise OperatorError("replay", f"a step that needs {step.rank_rows} rank rows on the graph {self.key}")
