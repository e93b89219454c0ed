"""The pool of ranks: what it reports of ranks that are there, die, hang, raise or cannot start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from polyaccel_conformance.case import Case
from polyaccel_conformance.errors import ConformanceError, UsageError
from polyaccel_conformance.multi.ranks import CHECK, RankPool
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer
from tests.conformance.multi.cases import reduce_case
from tests.conformance.multi.subjects import subject

CHECKS = ("values.exact", "comm.collectives", "comm.trace")


def test_ranks_are_processes_of_their_own_that_persist_over_cases(server: ForkServer) -> None:
    with RankPool(Subject(), 2, server=server, checks=CHECKS) as pool:
        results = [pool.run(reduce_case(2)) for _ in range(3)]
        pids = [[identity.pid for identity in result.identities] for result in results]
    assert all(result.passed for result in results)
    assert pids[0] == pids[1] == pids[2]
    assert len({*pids[0], os.getpid()}) == 3
    assert pool.restarts == 0
    identity = results[0].identities[1]
    assert (identity.rank, identity.backend, identity.transport, identity.device) == (1, "cpu", "gloo", "cpu")
    assert identity.torch_version
    assert results[0].checks == CHECKS
    assert len(results[0].verdicts) == 2
    assert results[0].implementation == "cpu.all_reduce"


def test_a_rank_that_dies_ends_the_case_and_the_next_one_gets_new_processes(server: ForkServer) -> None:
    with RankPool(subject("dies"), 3, server=server, checks=CHECKS, timeout=20) as pool:
        result = pool.run(reduce_case(3))
        (failure,) = [f for f in result.failures if f.check == CHECK]
        assert (failure.cause, failure.message) == ("rank lost", "rank 1: the process exited with code 7")
        assert [verdict.ending for verdict in result.verdicts] == ["finished", "crashed", "finished"]
        assert "CommunicationError" in str(result.verdicts[0].result)
        first = pool.identities
        assert pool.run(reduce_case(3, structure__scenario="plain")).failures
        assert pool.restarts == 1
        assert {identity.pid for identity in first}.isdisjoint(identity.pid for identity in pool.identities)


def test_a_rank_that_hangs_becomes_a_failing_case_that_is_saved(server: ForkServer, tmp_path: Path) -> None:
    case = reduce_case(2)
    with RankPool(subject("hangs"), 2, server=server, checks=CHECKS, timeout=1, case_timeout=3, hung=tmp_path) as pool:
        result = pool.run(case)
    (failure,) = [f for f in result.failures if f.cause == "hang"]
    assert failure.message.startswith("rank 1: no answer within")
    (saved,) = tmp_path.iterdir()
    assert Case.from_json(json.loads(saved.read_text())) == case


def test_an_error_on_one_rank_is_reported_as_that_rank_s_and_releases_the_others(server: ForkServer) -> None:
    with RankPool(subject("fails"), 2, server=server, checks=CHECKS, timeout=60) as pool:
        result = pool.run(reduce_case(2))
        assert result.failures
        assert all(failure.message.startswith("rank 1: ") for failure in result.failures), result.failures
        assert "something of the plugin's own" in result.failures[0].message
        # Rank 0 waits for a minute unless it is released.
        assert result.seconds < 20


def test_a_backend_that_cannot_be_opened_says_why(server: ForkServer) -> None:
    with (
        RankPool(subject("unusable"), 2, server=server) as pool,
        pytest.raises(ConformanceError, match="rank 0: BackendUnavailable: no such hardware here"),
    ):
        pool.start()


def test_a_backend_that_cannot_follow_a_fork_is_started_afresh(server: ForkServer) -> None:
    with RankPool(subject("no_fork"), 2, server=server, checks=CHECKS) as pool:
        assert pool.run(reduce_case(2)).passed
        assert not any(identity.fork_safe for identity in pool.identities)


def test_a_world_of_one_is_refused_and_so_is_a_case_of_another_world(server: ForkServer) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        RankPool(Subject(), 1, server=server)
    with RankPool(Subject(), 2, server=server) as pool, pytest.raises(UsageError, match="a case of 3 ranks"):
        pool.run(reduce_case(3))
