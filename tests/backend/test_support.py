"""Queries, and what a backend's table makes of callables and entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from polyaccel.backend import Availability, Backend, Device, Entry, Query, TorchDevice
from polyaccel.backend.backend import Implementations
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.step import TokenClass

QUERY = Query(
    site="layers.0.qkv",
    operator="qkv_rope_cache",
    token_class=TokenClass.MIXED,
    adapters=True,
    static={"heads": 9, "dtype": "float32"},
    ranges={"tokens": (1, 64)},
)


def test_a_parts_query_is_the_stations_with_another_operator() -> None:
    part = QUERY.for_part("linear")
    assert part.operator == "linear"
    assert (part.site, part.token_class, part.adapters) == (QUERY.site, QUERY.token_class, QUERY.adapters)
    assert (part.static, part.ranges) == (QUERY.static, QUERY.ranges)


def test_an_integer_that_is_missing_or_no_number_is_the_default() -> None:
    assert QUERY.integer("heads") == 9
    assert QUERY.integer("experts") == 0
    assert QUERY.integer("experts", 4) == 4
    assert QUERY.integer("dtype", 7) == 7


class _Backend(Backend):
    name = "made"

    def __init__(self, operators: Mapping[str, object]) -> None:
        super().__init__()
        self._given = operators

    def probe(self) -> Availability:
        return Availability(usable=True)

    def devices(self) -> Sequence[Device]:
        return (TorchDevice("cpu"),)

    def operators(self) -> Mapping[str, Implementations]:
        return self._given  # type: ignore[return-value]


def test_a_table_has_entries_in_the_order_in_which_they_were_given() -> None:
    first, second = Entry(lambda x: x, name="first"), Entry(lambda x: x, name="second")
    table = _Backend({"gelu": len, "rms_norm": first, "linear": [second, first]}).table()
    assert table["gelu"][0].fn is len
    assert table["gelu"][0].supports(QUERY) == []
    assert table["rms_norm"] == (first,)
    assert table["linear"] == (second, first)


def test_what_is_neither_callable_nor_an_entry_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="backend 'made': operator 'gelu' maps to 3"):
        _Backend({"gelu": 3}).table()


def test_only_the_mandatory_methods_need_to_be_written() -> None:
    assert Backend.__abstractmethods__ == {"probe", "devices", "operators"}
