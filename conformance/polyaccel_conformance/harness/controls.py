"""Deliberately wrong operators around a bench's own: what makes a check fail on the same device in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from polyaccel.backend import Entry
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.harness.overlay import Overlay
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Exactly, Prepared, Problem
from polyaccel_conformance.trial import Trial

if TYPE_CHECKING:
    from polyaccel_conformance.check import Check, Control

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
"""From an operator to a wrong one. What it computes with is complete: the device is waited for before and after."""


def linear_problem(*, dtype: str = "float32", data: str = "normal", layout: str = "row_padded") -> Problem:
    """A small ``linear``, which every backend has."""
    from polyaccel_conformance.problems.linear import LinearProblem

    axes: dict[str, Choice] = {"dims.tokens": 5, "dims.k": 16, "dims.n": 8, "layouts.x": layout}
    axes |= {"data": data, "dtype": dtype, "structure.slices": "one", "structure.bias": True}
    return LinearProblem(Case.of("linear", axes, 20_260_101))


class NormProblem(Problem):
    """A small ``rms_norm`` with a residual: the operator of the contract with two operands that may be one tensor."""

    def __init__(self) -> None:
        super().__init__(Case.of("rms_norm", {"dtype": "float32", "data": "normal"}, 20_260_102))
        shapes = {"x": (5, 16), "weight": (16,), "residual": (5, 16)}
        self.operands = {n: Operand.rounded(self.source.normal(n, s), "float32") for n, s in shapes.items()}

    def prepare(self, bench: Bench) -> Prepared:
        return Prepared(
            arguments={"eps": 1e-5},
            collect=lambda result, _: {"normed": _part(result, 0), "s": _part(result, 1)},
            static={"dtype": "float32", "hidden": 16},
            ranges={"tokens": (5, 5)},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        return {}


def _part(result: object, index: int) -> torch.Tensor:
    assert isinstance(result, tuple)
    part = result[index]
    assert isinstance(part, torch.Tensor)
    return part


def wrong_bench(bench: Bench, problem: Problem, wrap: Wrap, **changes: Any) -> Bench:
    """A bench whose only difference is the problem's operator. ``changes``: other fields of its entry."""
    prepared = problem.prepare(bench)
    resolved = bench.resolve(problem.case.operator, prepared)
    prepared.release()
    operator, planned = problem.case.operator, resolved.planned
    known = [
        entry
        for entry in bench.backend.table().get(operator, ())
        if planned.implementation == (entry.name or f"{bench.backend.name}.{operator}")
    ]
    entry = known[0] if known else Entry(resolved.call)

    def settled(*args: Any) -> Any:
        result = entry.fn(*args)
        bench.synchronize()
        return result

    changed = replace(entry, fn=wrap(settled), name=planned.implementation, supports=_always, **changes)
    return Bench(Overlay(bench.backend, {operator: changed}), bench.device, bench.comm)


def _always(query: object) -> list[str]:
    return []


def verdict(bench: Bench, check: Check, problem: Problem, wrap: Wrap, **changes: Any) -> Control:
    """Ask ``check`` about the wrong operator. Anything but a failure that the check itself found is none."""
    trial = Trial(wrong_bench(bench, problem, wrap, **changes), problem)
    try:
        found = check.run(trial)
    except Exception:
        return "did not fail"
    finally:
        trial.close()
    return "did not fail" if found is None else "failed as it must"


def all_of(*controls: Control) -> Control:
    """A check that asks several things is proven by a control for each."""
    for control in controls:
        if control != "failed as it must":
            return control
    return "failed as it must"


def wrong_values(bench: Bench, check: Check) -> Control:
    """One element of ``linear`` wrong: by a unit in the last place where equality is asked for, else by half of it."""
    exact = check.tier == 1

    def wrap(fn: Function) -> Function:
        def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
            y: torch.Tensor = fn(x, weight).clone()
            y[0, 0] = torch.nextafter(y[0, 0], y[0, 0] + 1) if exact else y[0, 0] * 1.5 + 1
            return y

        return wrong

    return verdict(bench, check, linear_problem(data="integers" if exact else "normal"), wrap)
