"""When the call with contiguous operands is made, and what it is made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polyaccel.backend.cpu.backend import CpuBackend
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import Failure
from polyaccel_conformance.checks import layout
from polyaccel_conformance.checks.layout import DENSE, LAYOUT_CHECKS
from polyaccel_conformance.harness.controls import linear_problem, wrong_bench
from polyaccel_conformance.trial import Setting, Trial

Function = Callable[..., Any]
PLAIN = Setting()
CHECK = LAYOUT_CHECKS["layout.arguments"]


def _asked(data: str, wrap: Callable[[Function], Function]) -> tuple[Failure | None, bool]:
    """What the check finds in ``linear`` so changed, and whether it made the call with contiguous operands."""
    problem = linear_problem(data=data, layout="row_padded")
    trial = _Remembering(wrong_bench(Bench(CpuBackend()), problem, wrap), problem)
    found = CHECK.run(trial)
    trial.close()
    return found, DENSE in trial.made


class _Remembering(Trial):
    __slots__ = ("made",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made: list[Setting] = []

    def ask(self, setting: Setting = PLAIN) -> Any:
        self.made.append(setting)
        return super().ask(setting)


def _as_it_is(fn: Function) -> Function:
    return fn


def _rows_taken_as_dense(fn: Function) -> Function:
    return lambda x, weight: fn(x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset()), weight)


def _wrong_everywhere(fn: Function) -> Function:
    return lambda x, weight: fn(x, weight) * 3 + 1


def _copied(fn: Function) -> Function:
    return lambda x, weight: fn(x.clone(memory_format=torch.contiguous_format), weight)


def _converted(fn: Function) -> Function:
    return lambda x, weight: fn(x.double().float(), weight)


def _converted_where_strange(fn: Function) -> Function:
    return lambda x, weight: fn(x if x.is_contiguous() else x.double().float(), weight)


@pytest.mark.parametrize("data", ["integers", "normal"])
def test_a_right_result_that_cost_no_copy_is_compared_with_no_other(data: str) -> None:
    assert _asked(data, _as_it_is) == (None, False)


@pytest.mark.parametrize("data", ["integers", "normal"])
def test_strides_that_are_not_read_are_found(data: str) -> None:
    found, dense = _asked(data, _rows_taken_as_dense)
    assert dense
    assert found is not None
    assert found.cause == "result depends on the layout"


@pytest.mark.parametrize("data", ["integers", "normal"])
def test_what_is_wrong_in_every_layout_is_not_the_layouts(data: str) -> None:
    assert _asked(data, _wrong_everywhere) == (None, True)


def test_a_copy_that_every_layout_costs_is_not_the_layouts() -> None:
    assert _asked("integers", _copied) == (None, True)


@pytest.mark.parametrize("measured", [False, True])
def test_a_conversion_is_compared_with_that_of_other_layouts_in_one_case_of_some(
    measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_is_measured", lambda case: measured)
    assert _asked("integers", _converted) == (None, measured)


def test_a_conversion_that_only_a_strange_layout_costs_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_is_measured", lambda case: True)
    found, dense = _asked("integers", _converted_where_strange)
    assert dense
    assert found is not None
    assert found.cause == "copies 'x' uncounted"
