"""Cases of ``sample``: every parameter is drawn, healthy backends pass, wrong ones do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from polyaccel.backend import Backend, SampleOutput, SamplingRow, TableBackend, load
from polyaccel.backend.composite import sampling
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, run_case
from polyaccel_conformance.checks.values import VALUE_CHECKS
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.sample import SampleProblem, SampleProblems
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems

SUBJECTS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composite": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}
STRUCTURE = {
    "bias_ids": "bias",
    "bias_values": "bias",
    "allowed": "mask",
    "prompt_ids": "history",
    "output_ids": "history",
    "forbidden_ids": "forbidden",
    "forbidden_until": "forbidden",
}


def result(backend: Backend, problem: Problem) -> CaseResult:
    return run_case(Bench(backend), problem, list(VALUE_CHECKS.values()))


def test_every_parameter_of_a_request_is_drawn() -> None:
    axes = SampleProblems().axes()
    for field in dataclasses.fields(SamplingRow):
        # The seed is the core's: it draws the uniforms.
        if field.name != "seed":
            name = STRUCTURE.get(field.name)
            assert (f"structure.{name}" if name else f"attributes.{field.name}") in axes
    assert {"layouts.logits", "structure.slots", "dims.steps"} <= set(axes)


def test_mending_twice_changes_nothing_more() -> None:
    for problem in problems(SampleProblems(), 200, 51):
        axes = {name: problem.case.axes()[name] for name in SampleProblems().axes()}
        assert SampleProblems().mend(dict(axes)) == axes
        assert Case.from_json(problem.case.to_json()) == problem.case


@pytest.mark.parametrize("subject", SUBJECTS)
def test_healthy_backends_pass(subject: str) -> None:
    backend = SUBJECTS[subject]()
    failures = [f for p in problems(SampleProblems(), 100, 52) for f in result(backend, p).failures]
    assert failures == []


def test_few_rows_are_ambiguous() -> None:
    drawn = [p for p in problems(SampleProblems(), 300, 53) if isinstance(p, SampleProblem)]
    assert sum(p.ambiguous for p in drawn) <= 0.01 * sum(len(p.requests) for p in drawn)


def wrong(change: Callable[[torch.Tensor, SampleOutput], SampleOutput]) -> Callable[..., SampleOutput]:
    def sample(logits: torch.Tensor, state: object, step: object) -> SampleOutput:
        return change(logits, sampling.sample(logits, state, step))  # type: ignore[arg-type]

    return sample


def next_id(logits: torch.Tensor, output: SampleOutput) -> SampleOutput:
    return dataclasses.replace(output, ids=(output.ids + 1) % logits.shape[1])


def last_row_of_a_batch(logits: torch.Tensor, output: SampleOutput) -> SampleOutput:
    ids = output.ids.clone()
    if len(ids) > 2:
        ids[-1] = ids[0]
    return dataclasses.replace(output, ids=ids)


def rounded_logprobs(logits: torch.Tensor, output: SampleOutput) -> SampleOutput:
    if output.logprobs is None:
        return output
    return dataclasses.replace(output, logprobs=output.logprobs.bfloat16().float())


def swapped_top(logits: torch.Tensor, output: SampleOutput) -> SampleOutput:
    if output.top_ids is None or output.top_ids.shape[1] < 2:
        return output
    return dataclasses.replace(output, top_ids=output.top_ids[:, [1, 0, *range(2, output.top_ids.shape[1])]])


@pytest.mark.parametrize("change", [next_id, last_row_of_a_batch, rounded_logprobs, swapped_top])
def test_a_wrong_result_is_seen(change: Callable[[torch.Tensor, SampleOutput], SampleOutput]) -> None:
    backend = TableBackend("cpu", {"sample": wrong(change)})
    assert any(not result(backend, p).passed for p in problems(SampleProblems(), 40, 54))


def test_counts_that_are_not_updated_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyaccel.backend.composite.sampling_state import TensorSamplingState

    def forgets(self: TensorSamplingState, slots: object, rows: torch.Tensor, ids: torch.Tensor, needs: object) -> None:
        self._last.index_copy_(0, rows, ids)

    monkeypatch.setattr(TensorSamplingState, "advance", forgets)
    drawn = problems(SampleProblems(), 60, 55, dims__steps=(2,), attributes__frequency_penalty=(0.25,))
    backend = TableBackend("cpu", {})
    assert any(not result(backend, p).passed for p in drawn)
