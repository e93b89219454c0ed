"""Bisecting a model over its operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from polyaccel.backend import Backend, TableBackend, load
from polyaccel.backend.composite.linear import linear
from polyaccel_conformance.cli.main import main
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.models.bisect import bisect, bisect_ranks
from polyaccel_conformance.models.engines import Workshop
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer
from tests.conformance.models import wrong_operators
from tests.conformance.multi.subjects import subject

WRONG = Path(wrong_operators.__file__)


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with Workshop() as made:
        yield made


def _opener(**operators: Callable[..., Any]) -> Callable[[], Backend]:
    return lambda: TableBackend("cpu", operators)


def _half(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :n]) * x[..., n:] / 2


def _right(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :n]) * x[..., n:]


def _off_by_one(x: torch.Tensor, weight: object) -> torch.Tensor:
    return linear(x.roll(1, -1), weight)  # type: ignore[arg-type]


def test_a_right_backend_has_no_culprit(shop: Workshop) -> None:
    found = bisect(lambda: load("cpu"), "llama", shop)
    assert found.culprit is None
    assert not found.whole.wrong
    assert {suspect.native[0] for suspect in found.alone} >= {"paged_attention", "sgmv", "qkv_rope_cache", "sample"}


def test_the_wrong_operator_is_named(shop: Workshop) -> None:
    found = bisect(_opener(silu_and_mul=_half), "llama", shop)
    assert found.whole.wrong
    assert found.culprit == "silu_and_mul"
    assert "first to disagree: silu_and_mul" in list(found.lines())


def test_one_of_several_native_operators_is_named(shop: Workshop) -> None:
    select = _opener(silu_and_mul=_right, select_rows=lambda x, step: x[: len(step.input.logits_rows)])
    assert bisect(select, "llama", shop).culprit == "select_rows"


def test_a_wrong_mandatory_operator_is_named_as_linear(shop: Workshop) -> None:
    assert bisect(_opener(linear=_off_by_one), "llama", shop).culprit == "linear"


def test_an_operator_that_raises_is_named_with_its_error(shop: Workshop) -> None:
    def raises(*_: object) -> None:
        raise RuntimeError("no kernel image")

    found = bisect(_opener(paged_attention=raises), "llama", shop)
    assert found.culprit == "paged_attention"
    assert "no kernel image" in found.whole.wrong


@pytest.mark.parametrize("name", ["silu_and_mul", "rms_norm", "sgmv", "linear", "select_rows"])
def test_the_command_names_the_wrong_operator(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", "--table", f"{WRONG}:{name}"]) == ExitCode.FAIL
    assert capsys.readouterr().out.splitlines()[-1] == f"first to disagree: {name}"


def test_the_command_passes_a_right_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", "--table", f"{WRONG}:right"]) == ExitCode.PASS
    assert capsys.readouterr().out.startswith("model llama: answers agree")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("name", "culprit"),
    [("times_world", "communicator"), ("full_delta", "row_parallel_linear"), ("composites", None)],
)
def test_what_is_wrong_on_several_ranks_only_is_named(server: ForkServer, name: str, culprit: str | None) -> None:
    found = bisect_ranks(subject(name), "llama", 2, server)
    assert found.culprit == culprit
    assert bool(found.whole.wrong) is (culprit is not None)
    assert next(iter(found.lines())).startswith("model llama on 2 ranks: ")


def test_an_operator_that_is_wrong_anywhere_is_named_on_several_ranks(server: ForkServer) -> None:
    wrong = Subject(kind="table", name="silu_and_mul", path=str(WRONG))
    found = bisect_ranks(wrong, "llama", 2, server)
    assert found.culprit == "silu_and_mul"
    assert found.whole.wrong.startswith("ranks 0, 1: layers.0.gate_up: ")


def test_more_ranks_than_there_is_room_for_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--devices 3: backend 'simulated' has 2 devices"):
        bisect_ranks(Subject(name="simulated"), "llama", 3)
    assert main(["bisect", "--backend", "cpu", "--devices", "10"]) == ExitCode.USAGE
    assert "--devices 10: the model llama has 9 query heads, 9 ranks at most" in capsys.readouterr().err
