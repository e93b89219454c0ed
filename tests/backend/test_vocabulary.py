"""The specifications agree with each other, with the stations' bodies and with the null backend."""

from __future__ import annotations

import inspect

import pytest

from polyaccel.backend import OPERATORS, STATIONS, OperatorSpec, stations
from polyaccel.backend.null.backend import NullBackend
from polyaccel.backend.spec import NonFinite
from polyaccel.backend.step import TokenClass
from polyaccel.backend.support import Query
from polyaccel.backend.version import API_VERSION

EVERYTHING: dict[str, OperatorSpec] = {**OPERATORS, **STATIONS}


def _query(station: str, *, adapters: bool, **static: bool | int) -> Query:
    return Query(site="s", operator=station, token_class=TokenClass.DECODE, adapters=adapters, static=static)


def test_no_name_is_used_twice() -> None:
    assert set(OPERATORS).isdisjoint(STATIONS)
    assert all(name == spec.name for name, spec in EVERYTHING.items())


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=list(EVERYTHING))
def test_a_specification_says_what_it_computes_and_returns(spec: OperatorSpec) -> None:
    assert spec.semantics.strip()
    assert spec.returns.strip()
    assert (1, 0) <= spec.since <= API_VERSION


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=list(EVERYTHING))
def test_arguments_have_unique_names_and_tensors_have_shapes_and_dtypes(spec: OperatorSpec) -> None:
    names = [argument.name for argument in spec.arguments]
    assert len(set(names)) == len(names)
    for argument in spec.arguments:
        assert spec.argument(argument.name) is argument
        assert isinstance(argument.non_finite, NonFinite)
        assert set(argument.may_alias) <= set(names) - {argument.name}
        if argument.kind == "tensor":
            assert argument.shape.startswith("["), f"{spec.name}.{argument.name} has no shape"
            assert argument.dtypes, f"{spec.name}.{argument.name} has no dtypes"
    with pytest.raises(KeyError, match=spec.name):
        spec.argument("no such argument")


@pytest.mark.parametrize("spec", STATIONS.values(), ids=list(STATIONS))
def test_a_station_has_parts_and_all_of_them_exist(spec: OperatorSpec) -> None:
    assert spec.is_station
    assert spec.parts
    assert set(spec.parts) <= set(EVERYTHING)


@pytest.mark.parametrize("spec", OPERATORS.values(), ids=list(OPERATORS))
def test_an_operator_has_no_parts(spec: OperatorSpec) -> None:
    assert not spec.is_station


def test_what_every_backend_must_bring_is_linear_and_dequantize() -> None:
    assert [name for name, spec in OPERATORS.items() if spec.mandatory] == ["linear", "dequantize"]


@pytest.mark.parametrize("station", STATIONS)
@pytest.mark.parametrize("adapters", [False, True])
def test_a_stations_body_takes_the_specified_arguments(station: str, adapters: bool) -> None:
    parts = stations.parts_of(station, _query(station, adapters=adapters, world_size=2, qk_norm=True))
    body = stations.build(station, {part: lambda *a: None for part in parts})
    specified = STATIONS[station].arguments
    parameters = inspect.signature(body).parameters
    assert list(parameters) == [argument.name for argument in specified]


def test_parts_are_those_that_a_query_needs() -> None:
    qkv = ("linear", "sgmv", "rms_norm", "rotary_embedding", "write_kv_cache")
    query = _query("qkv_rope_cache", adapters=True, qk_norm=True, world_size=2)
    assert stations.parts_of("qkv_rope_cache", query) == qkv
    query = _query("qkv_rope_cache", adapters=False, world_size=2)
    assert stations.parts_of("qkv_rope_cache", query) == ("linear", "rotary_embedding", "write_kv_cache")
    query = _query("row_parallel_linear", adapters=True, world_size=2)
    assert stations.parts_of("row_parallel_linear", query) == ("linear", "sgmv", "all_reduce")
    query = _query("row_parallel_linear", adapters=False, world_size=1)
    assert stations.parts_of("row_parallel_linear", query) == ("linear",)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_null_backend_has_every_operator_with_the_specified_arguments(name: str) -> None:
    operator = NullBackend().operators()[name]
    assert callable(operator)
    assert list(inspect.signature(operator).parameters) == [argument.name for argument in OPERATORS[name].arguments]


def test_in_place_collectives_say_that_they_change_their_tensor() -> None:
    mutated = {name for name, spec in OPERATORS.items() if spec.group == "ranks" and spec.arguments[0].mutated}
    assert mutated == {"all_reduce", "broadcast"}
