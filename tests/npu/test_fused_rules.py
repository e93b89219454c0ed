"""When MatmulAllReduce is planned, and every reason why it is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import Query, TokenClass
from polyaccel_npu.chip import Chip, chip_of
from polyaccel_npu.fused import refusals


class Group:
    """What the rules ask of a communicator."""

    def __init__(self, hosts: int) -> None:
        self.hosts = hosts

    def fused_refusals(self) -> list[str]:
        return [] if self.hosts == 1 else [f"ranks on {self.hosts} nodes"]


def asked(
    world: int,
    chip: Chip,
    dtype: str,
    token_class: TokenClass = TokenClass.MIXED,
    groups: int = 1,
    hosts: int = 1,
    k: int = 64,
) -> list[str]:
    query = Query(
        site="o",
        operator="row_parallel_linear",
        token_class=token_class,
        adapters=False,
        static={"world_size": world, "dtype": dtype, "k": k},
    )
    return refusals(query, [Group(hosts)] * groups, [chip.family], chip.fused_all_reduce)  # type: ignore[list-item]


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_prefill_on_910b_is_fused_at_the_documented_world_sizes(world: int, dtype: str) -> None:
    assert asked(world, chip_of("Ascend910B3"), dtype) == []


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("decode", {"token_class": TokenClass.DECODE}),
        ("3 ranks", {"world": 3}),
        ("one rank", {"world": 1}),
        ("chip A3", {"chip": chip_of("Ascend910_9391")}),
        ("chip 310P", {"chip": chip_of("Ascend310P3")}),
        ("dtype float32", {"dtype": "float32"}),
        ("2 communicators", {"groups": 2}),
        ("no communicator", {"groups": 0}),
        ("2 nodes", {"hosts": 2}),
        ("above", {"k": 2**31}),
    ],
)
def test_each_rule_that_is_broken_is_a_reason_of_its_own(reason: str, changed: dict[str, object]) -> None:
    given_ = {"world": 2, "chip": chip_of("Ascend910B3"), "dtype": "float16"} | changed
    found = asked(**given_)  # type: ignore[arg-type]
    assert len(found) == 1
    assert reason in found[0]


@given(
    world=st.integers(1, 16),
    name=st.sampled_from(["Ascend910B1", "Ascend910B4", "Ascend910_9391", "Ascend310P3", "Ascend910A", "Ascend950"]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "int8"]),
    token_class=st.sampled_from(TokenClass),
    groups=st.integers(0, 3),
    hosts=st.integers(1, 2),
    k=st.integers(1, 2**32),
)
def test_nothing_is_fused_that_the_document_does_not_allow(
    world: int, name: str, dtype: str, token_class: TokenClass, groups: int, hosts: int, k: int
) -> None:
    legal = (
        world in (2, 4, 8)
        and name.startswith("Ascend910B")
        and dtype in ("float16", "bfloat16")
        and token_class is TokenClass.MIXED
        and groups == 1
        and hosts == 1
        and k < 2**31
    )
    assert (asked(world, chip_of(name), dtype, token_class, groups, hosts, k) == []) == legal


def test_all_reasons_are_given_at_once() -> None:
    found = asked(3, chip_of("Ascend310P3"), "float32", TokenClass.DECODE, groups=2)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("name", "family", "bfloat16"),
    [
        ("Ascend910B3", "A2", True),
        ("Ascend910_9391", "A3", True),
        ("Ascend310P3", "310P", False),
        ("Ascend910A", "910A", False),
        ("Ascend950PR", "950", True),
    ],
)
def test_chips_are_known_by_their_names(name: str, family: str, bfloat16: bool) -> None:
    chip = chip_of(name)
    assert (chip.family, chip.bfloat16, chip.refusal) == (family, bfloat16, "")


def test_an_unknown_chip_is_refused_by_name() -> None:
    assert "Ascend042" in chip_of("Ascend042").refusal
