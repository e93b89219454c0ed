from __future__ import annotations

import math

import pytest

from polyaccel.backend.errors import RequestRejected
from polyaccel.lora.mix import normalise_mix


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (None, ()),
        ({}, ()),
        ("pirate", (("pirate", 1.0),)),
        ({"pirate": 0.5}, (("pirate", 0.5),)),
        ({"b": 1, "a": -2.5}, (("a", -2.5), ("b", 1.0))),
        ([("b", 1), ["a", 0.0]], (("a", 0.0), ("b", 1.0))),
    ],
)
def test_every_form_becomes_ordered_names_and_weights(argument: object, expected: object) -> None:
    assert normalise_mix(argument) == expected  # type: ignore[arg-type]


def test_equal_mixes_are_equal_whatever_their_order() -> None:
    assert normalise_mix({"a": 0.25, "b": 0.75}) == normalise_mix({"b": 0.75, "a": 0.25})


@pytest.mark.parametrize(
    "argument",
    [
        "",
        {"": 1.0},
        {1: 1.0},
        {"a": "1"},
        {"a": None},
        {"a": True},
        {"a": math.nan},
        {"a": math.inf},
        {"a": 10**400},
        [("a", 1.0), ("a", 2.0)],
        ["a"],
        [("a", 1.0), "bc"],
        [("a",)],
        5,
        b"ab",
        {f"a{i}": 1.0 for i in range(9)},
    ],
    ids=str,
)
def test_anything_else_is_rejected(argument: object) -> None:
    with pytest.raises(RequestRejected, match="adapter"):
        normalise_mix(argument)  # type: ignore[arg-type]


def test_eight_adapters_can_be_mixed() -> None:
    assert len(normalise_mix({f"a{i}": 1.0 for i in range(8)})) == 8
