"""Sums over ranks are measured by all of them together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.multi.ranks import RankPool
from polyaccel_conformance.probes.registry import RANKED_PROBES
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer
from tests.conformance.multi.cases import ranked_case

CHECKS = ("numerics.measured",)
ROUGH = Path(__file__).with_name("rough.py")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


def causes(pool: RankPool, operator: str, world: int, dtype: str) -> set[str]:
    result = pool.run(ranked_case(operator, world, dtype=dtype, data="normal"))
    assert result.checks == CHECKS
    return {failure.cause for failure in result.failures}


@pytest.mark.parametrize("world", [2, 3])
def test_healthy_ranks_keep_what_the_contract_asks(server: ForkServer, world: int) -> None:
    with RankPool(Subject(), world, server=server, checks=CHECKS) as pool:
        found = {(op, dtype): causes(pool, op, world, dtype) for op in RANKED_PROBES for dtype in FORMATS}
    assert set().union(*found.values()) == set()


@pytest.mark.parametrize(("name", "cause"), [("sent", "input bits"), ("kept", "accumulator bits")])
def test_ranks_that_lose_bits_are_found(server: ForkServer, name: str, cause: str) -> None:
    subject = Subject(kind="table", name=name, path=str(ROUGH))
    with RankPool(subject, 3, server=server, checks=CHECKS) as pool:
        assert cause in causes(pool, "all_reduce", 3, "bfloat16")
