"""Bisecting a model over its operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from polyaccel.backend import Backend, TableBackend, load
from polyaccel.backend.composite.linear import linear
from polyaccel_conformance.models.bisect import bisect
from polyaccel_conformance.models.engines import Workshop


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
