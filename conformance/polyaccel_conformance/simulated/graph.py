"""A captured step: the list of calls that it submitted, over buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from polyaccel.backend import Collective, Communicator, Graph, GraphKey, Ledger, OperatorError, SampleOutput, Step
from polyaccel_conformance.simulated.device import SimulatedDevice
from polyaccel_conformance.simulated.step import SimulatedStep
from polyaccel_conformance.simulated.storage import SimulatedSamplingState
from polyaccel_conformance.simulated.stream import Task


class SimulatedGraph(Graph):
    """Replaying submits the recorded calls again to the device's current stream; launches and collectives count as if
    they had been issued."""

    def __init__(
        self,
        key: GraphKey,
        example: SimulatedStep,
        output: SampleOutput,
        *,
        device: SimulatedDevice,
        ledger: Ledger,
        communicator: Communicator | None,
        tasks: Sequence[Task],
        launches: Mapping[str, int],
        collectives: Sequence[Collective],
    ) -> None:
        self.key = key
        self._example, self._output, self._device = example, output, device
        self._ledger, self._communicator = ledger, communicator
        self._tasks: Sequence[Task] | None = list(tasks)
        self._launches, self._collectives = dict(launches), list(collectives)

    def replay(self, step: Step) -> SampleOutput:
        if self._tasks is None:
            raise OperatorError("replay", f"the graph {self.key} is closed")
        self._check(step)
        self._ledger.add(self._launches)
        if self._communicator is not None and self._communicator.trace is not None:
            self._communicator.trace += self._collectives
        runtime = self._device.runtime
        runtime.submit_all(self._tasks, runtime.current_stream(self._device.virtual))
        state = step.state.sampling
        if isinstance(state, SimulatedSamplingState) and not state.wants_logprobs(step.input.sample_slots.tolist()):
            return replace(self._output, logprobs=None, top_ids=None, top_logprobs=None)
        return self._output

    def close(self) -> None:
        self._tasks = None

    def _check(self, step: Step) -> None:
        example = self._example
        if not isinstance(step, SimulatedStep) or step.buffers is not example.buffers:
            raise OperatorError("replay", "the step's metadata is not where the graph reads it")
        extent, own = step.extent, example.extent
        if (extent.tokens, extent.sequences, extent.rows) != (own.tokens, own.sequences, own.rows):
            raise OperatorError("replay", f"a step of {extent} on the graph {self.key}")
        if step.has_more_rank_rows(self.key.rank_rows):
            raise OperatorError("replay", f"a step with adapters beyond the rank rows of {self.key}")
