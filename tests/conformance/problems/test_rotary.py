"""The problems of the rotary embedding and of select_rows: complete, passed by healthy backends, failed by bugs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from polyaccel.backend import RopeTable, TableBackend
from polyaccel.backend.composite import dense
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problems.rotary import RotaryProblems
from polyaccel_conformance.problems.select_rows import SelectRowsProblems
from tests.conformance.drawn import problems, verdict


def other_style(q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Any) -> object:
    return dense.rotary_embedding(
        q, k, replace(rope, style="half" if rope.style == "interleaved" else "interleaved"), step
    )


def backwards(q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Any) -> object:
    return dense.rotary_embedding(q, k, replace(rope, sin=-rope.sin), step)


def by_row(q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Any) -> object:
    moved = replace(rope, cos=rope.cos.roll(1, 0), sin=rope.sin.roll(1, 0))
    return dense.rotary_embedding(q, k, moved, step)


def only_q(q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Any) -> object:
    return dense.rotary_embedding(q, k, rope, step)[0], k.clone()


@pytest.mark.parametrize("wrong", [other_style, backwards, by_row, only_q])
@pytest.mark.parametrize("data", ["normal", "permutation", "integers"])
def test_a_wrong_rotation_fails(wrong: Callable[..., object], data: str) -> None:
    bench = Bench(TableBackend("cpu", {"rotary_embedding": wrong}))
    where = {"dims__tokens": (7,), "dims__head_dim": (64,), "dims__rotary_dim": (16, 64), "data": (data,)}
    assert all(verdict(bench, p) for p in problems(RotaryProblems(), 6, 7, **where))


def test_the_row_after_the_selected_one_fails() -> None:
    def wrong(x: torch.Tensor, step: Any) -> torch.Tensor:
        return x.roll(1, 0).index_select(0, step.tensor("logits_rows"))

    bench = Bench(TableBackend("cpu", {"select_rows": wrong}))
    where = {"dims__tokens": (7,), "structure__rows": ("some", "last", "all")}
    assert all(verdict(bench, p) for p in problems(SelectRowsProblems(), 6, 7, **where))
