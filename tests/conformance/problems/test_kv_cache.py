"""The problems of write_kv_cache: complete, passed by healthy backends, failed by planted bugs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyaccel.backend import KVCache, TableBackend
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.problems.kv_cache import LAYERS, WriteKVCacheProblems, canonical
from polyaccel_conformance.problems.select_rows import SelectRowsProblem, SelectRowsProblems
from polyaccel_conformance.problems.steps import Paging, build_step
from polyaccel_conformance.words import Source
from tests.conformance.drawn import problems, verdict

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "copies.json").read_text())


Write = Callable[[torch.Tensor, torch.Tensor, KVCache, int, Any], None]


def into_slot_zero(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(layer, step.tensor("kv_slots").clamp(min=0), k, v)


def into_the_other_layer(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(LAYERS - 1 - layer, step.tensor("kv_slots"), k, v)


def swapped(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(layer, step.tensor("kv_slots"), v, k)


def without_the_last(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    kv.write(layer, step.tensor("kv_slots")[:-1], k[:-1], v[:-1])


def also_the_next_slot(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Any) -> None:
    slots = step.tensor("kv_slots")
    most = kv.spec.blocks * kv.spec.block_size - 1
    kv.write(layer, torch.where(slots < 0, slots, (slots + 1).clamp(max=most)), k, v)
    kv.write(layer, slots, k, v)


@pytest.mark.parametrize(
    ("wrong", "unstored"),
    [
        (into_slot_zero, "all"),
        (into_the_other_layer, "none"),
        (swapped, "none"),
        (without_the_last, "none"),
        (also_the_next_slot, "none"),
    ],
)
def test_a_wrong_write_fails(wrong: Write, unstored: str) -> None:
    bench = Bench(TableBackend("cpu", {"write_kv_cache": wrong}))
    where = {"dims__tokens": (7,), "structure__unstored": (unstored,), "data": ("normal", "nonfinite")}
    assert all(verdict(bench, p) for p in problems(WriteKVCacheProblems(), 6, 7, **where))


@pytest.mark.parametrize("golden", [g for g in GOLDENS if "slots" in g], ids=lambda golden: golden["name"])
def test_tokens_go_to_the_slots_of_their_blocks(golden: dict[str, Any]) -> None:
    table = np.array([golden["table"]], dtype=np.int32)
    paging = Paging(tables=table, block_size=golden["block_size"], blocks=4)
    step = build_step(Source(1), [golden["queries"]], contexts=[golden["context"]], paging=paging)
    assert step.kv_slots.tolist() == golden["slots"]


@pytest.mark.parametrize("golden", [g for g in GOLDENS if "bits" in g], ids=lambda golden: golden["name"])
def test_stored_values_are_compared_by_their_bits(golden: dict[str, Any]) -> None:
    values = torch.tensor([float(value) for value in golden["values"]])
    assert canonical(values).tolist() == golden["bits"]


@pytest.mark.parametrize("golden", [g for g in GOLDENS if "rows" in g], ids=lambda golden: golden["name"])
def test_selected_rows_are_those_of_x(golden: dict[str, Any]) -> None:
    where = {"dtype": ("float32",), "dims__tokens": (len(golden["x"]),), "dims__hidden": (len(golden["x"][0]),)}
    problem = next(problems(SelectRowsProblems(), 1, 3, **where, structure__decode=(False,)))
    assert isinstance(problem, SelectRowsProblem)
    problem.operands = {"x": Operand.rounded(golden["x"], "float32")}
    problem.rows = np.array(golden["rows"], dtype=np.int64)
    assert problem.expected()["rows"].value.tolist() == golden["expected"]  # type: ignore[union-attr]
    assert verdict(Bench(TableBackend("cpu", {})), problem) is None
