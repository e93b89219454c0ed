"""Whole-model questions: healthy backends pass, and each question's planted bug is found."""

from __future__ import annotations

import pytest

from polyaccel.backend import Backend, TableBackend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import run_case
from polyaccel_conformance.models.questions import FAMILIES, MODEL_CHECKS, QUESTIONS
from polyaccel_conformance.subject import Subject
from tests.backends.folded.backend import FoldedBackend

NAMES = [question.operator for question in QUESTIONS if question.operator not in ("model.ranks", "model.float32")]
PLAIN = {"adapters": "many", "graphs": False, "overlap": True, "crowd": "crowded", "prefix_cache": True}


def _run(bench: Bench, name: str, **attributes: int | str) -> tuple[str, ...]:
    check = MODEL_CHECKS[name]
    case = Case.of(name, {f"attributes.{key}": value for key, value in attributes.items()})
    return tuple(failure.message for failure in run_case(bench, check.cases.problem(case), [check]).failures)


@pytest.fixture(scope="module")
def folded() -> Bench:
    return Bench(FoldedBackend())


@pytest.fixture(scope="module")
def cpu() -> Bench:
    return Bench(load("cpu"), subject=Subject(name="cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_with_everything_passes(folded: Bench, name: str) -> None:
    assert _run(folded, name, family="llama") == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpu_backend_answers_as_the_reference(cpu: Bench, family: str) -> None:
    assert _run(cpu, "model.tokens", family=family) == ()
    assert _run(cpu, "model.adapters", family=family) == ()


@pytest.mark.parametrize("name", NAMES)
def test_the_control_of_a_question_fails_as_it_must(folded: Bench, name: str) -> None:
    assert MODEL_CHECKS[name].control(folded) == "failed as it must"


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_answer_as_the_reference(cpu: Bench, world: int) -> None:
    assert _run(cpu, "model.ranks", family="llama", world=world, **PLAIN) == ()


def test_ranks_with_another_adapter_do_not(cpu: Bench) -> None:
    assert MODEL_CHECKS["model.ranks"].control(cpu) == "failed as it must"


def test_a_backend_without_graphs_is_not_judged_by_them() -> None:
    bench = Bench(load("cpu"), subject=Subject(name="cpu"))
    check = MODEL_CHECKS["model.graphs"]
    case = Case.of("model.graphs", {"attributes.family": "llama"})
    result = run_case(bench, check.cases.problem(case), [check])
    assert result.passed
    assert result.notes == ("backend 'cpu' does not capture graphs",)
    assert check.control(bench) == "impossible here"


def test_a_wrong_operator_changes_the_tokens() -> None:
    import torch

    def wrong(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return torch.nn.functional.gelu(x[..., :half]) * x[..., half:]

    class Wrong(TableBackend):
        def __init__(self) -> None:
            super().__init__("cpu", {"silu_and_mul": wrong})

    opened: Backend = Wrong()
    messages = _run(Bench(opened), "model.tokens", family="llama")
    assert len(messages) == 1
