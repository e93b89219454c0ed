"""Everything that an operator's specification lets vary is an axis of its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from polyaccel.backend import OPERATORS, STATIONS, OperatorSpec
from polyaccel.backend.spec import ArgumentKind, Layout
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.harness.layouts import LAYOUTS, ROW_PADDED
from polyaccel_conformance.multi.registry import RANKED_SETS
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.registry import PROBLEM_SETS

SPECS: Mapping[str, OperatorSpec] = {**OPERATORS, **STATIONS}
REGISTERED = [name for name in SPECS if name in PROBLEM_SETS or name in RANKED_SETS]

UNDER_ANOTHER_NAME: Mapping[tuple[str, str], str] = {
    ("moe_route", "top_k"): "dims.top_k",
    ("all_to_all", "send_rows"): "structure.counts",
    ("all_to_all", "receive_rows"): "structure.counts",
    ("column_linear", "row_set"): "structure.decode",
    ("qkv_rope_cache", "head_dim"): "dims.head_dim",
}
"""Attributes that follow from an axis of another name."""

OF_KIND: Mapping[ArgumentKind, tuple[str, ...]] = {
    "weight": ("structure.slices", "structure.weight", "structure.bias", "structure.ranks", "structure.quantised"),
    "step": ("structure.decode", "structure.phase", "structure.rows", "structure.adapters", "structure.positions"),
    "kv": ("structure.blocks", "attributes.layer"),
    "communicator": ("ranks",),
    "sampling": ("structure.history", "structure.mask", "structure.bias"),
    "rope": ("structure.positions", "dims.rotary_dim", "attributes.style"),
}
"""At least one of these axes varies what an argument of this kind holds."""


def axes_of(operator: str) -> dict[str, list[Choice]]:
    """Axes of an operator's cases of one rank and of several, with all their values."""
    found: dict[str, list[Choice]] = {}
    for sets in (PROBLEM_SETS, RANKED_SETS):
        if operator in sets:
            for path, values in sets[operator].axes().items():
                found.setdefault(path, []).extend(values)
    if operator in RANKED_SETS:
        found["ranks"] = [2, 4]
    return found


def missing_axes(spec: OperatorSpec, axes: Mapping[str, Sequence[Choice]]) -> list[str]:
    """What of a specification no axis varies."""
    wrong: list[str] = []
    for argument in spec.arguments:
        name = argument.name
        if argument.kind == "tensor" and f"layouts.{name}" not in axes:
            wrong.append(f"layout of {name}")
        elif argument.kind == "tensor":
            accepted = {layout for kind in argument.layouts for layout in LAYOUTS[kind]}
            # One row has no row stride, so that this layout may be left out there.
            one_row = "," not in argument.shape and "..." not in argument.shape
            required = accepted - ({ROW_PADDED} if one_row else set())
            drawn = set(map(str, axes[f"layouts.{name}"]))
            if Layout.STRIDED not in argument.layouts and not required <= drawn <= accepted:
                wrong.append(f"layouts of {name} are {sorted(drawn)}, promised are {sorted(accepted)}")
        elif argument.kind == "attribute":
            path = UNDER_ANOTHER_NAME.get((spec.name, name), f"attributes.{name}")
            if path not in axes or len(set(axes[path])) < min(2, max(len(argument.values), 1)):
                wrong.append(f"attribute {name}")
            elif path.startswith("attributes.") and not set(argument.values) <= set(axes[path]):
                wrong.append(f"values of attribute {name}")
        elif not any(path in axes for path in OF_KIND[argument.kind]):
            wrong.append(f"argument {name} of kind {argument.kind}")
        if argument.optional and not any(name in path for path in axes if path.startswith("structure.")):
            wrong.append(f"presence of {name}")
        for other in argument.may_alias:
            if f"{name}={other}" not in axes.get("alias", ()):
                wrong.append(f"alias {name}={other}")
    if not set(FORMATS) <= set(map(str, axes.get("dtype", ()))) and any(a.dtypes for a in spec.arguments):
        wrong.append("dtype")
    return wrong


@pytest.mark.parametrize("operator", REGISTERED)
def test_every_argument_and_attribute_of_the_spec_is_a_drawn_axis(operator: str) -> None:
    assert missing_axes(SPECS[operator], axes_of(operator)) == []


def test_an_axis_that_is_taken_away_is_missed() -> None:
    axes = axes_of("rms_norm")
    for path in ("layouts.x", "layouts.residual", "attributes.eps", "structure.residual", "alias", "dtype"):
        fewer = {name: values for name, values in axes.items() if name != path}
        if path == "alias" and not any(argument.may_alias for argument in SPECS["rms_norm"].arguments):
            continue
        assert missing_axes(SPECS["rms_norm"], fewer), path


@pytest.mark.parametrize("problems", PROBLEM_SETS.values(), ids=str)
def test_the_first_value_of_every_axis_is_a_valid_case(problems: ProblemSet) -> None:
    simplest = problems.mend({path: values[0] for path, values in problems.axes().items()})
    assert simplest is not None
    case = Case.of(problems.operator, simplest)
    assert problems.problem(case).case == case
