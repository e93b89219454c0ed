"""What every communicator does: the trace, the checks before anything is sent, the group of one."""

from __future__ import annotations

import pytest
import torch

from polyaccel.backend import Collective, Communicator, SingleRank
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.null.communicator import NullCommunicator

X = torch.zeros(4, 3, dtype=torch.bfloat16)


def _call_all(comm: Communicator) -> None:
    rows = X.shape[0] // comm.world_size
    comm.all_reduce(X)
    comm.all_gather(X, 0)
    comm.reduce_scatter(X.float())
    comm.all_to_all(X, [rows] * comm.world_size, [rows] * comm.world_size)
    comm.broadcast(X)
    comm.barrier()


EXPECTED = [
    Collective("all_reduce", 24),
    Collective("all_gather", 24),
    Collective("reduce_scatter", 48),
    Collective("all_to_all", 24),
    Collective("broadcast", 24),
    Collective("barrier", 0),
]


class _Pair(SingleRank):
    """Rank 1 of two, whose sums are those of one."""

    rank = 1
    world_size = 2


@pytest.mark.parametrize("comm", [SingleRank(), NullCommunicator(_Pair())], ids=["single", "null"])
def test_kinds_and_bytes_are_traced_while_a_trace_is_there(comm: Communicator) -> None:
    _call_all(comm)
    assert comm.trace is None
    comm.trace = []
    _call_all(comm)
    assert comm.trace == EXPECTED
    comm.trace = None
    _call_all(comm)


def test_rows_that_ranks_cannot_share_are_refused_before_they_are_traced() -> None:
    comm = _Pair()
    comm.trace = []
    with pytest.raises(ConfigurationError, match="3 rows over 2 ranks"):
        comm.reduce_scatter(torch.zeros(3, 2))
    assert comm.trace == []


def test_alone_every_collective_gives_back_what_it_got() -> None:
    comm = SingleRank()
    x = torch.arange(6.0).view(3, 2)
    for got in (comm.all_reduce(x), comm.all_gather(x), comm.reduce_scatter(x), comm.all_to_all(x, [3], [3])):
        assert got is x
    assert comm.broadcast(x) is x
    assert comm.gather_objects("value") == ["value"]
    comm.barrier()
    comm.close()


def test_ranks_of_the_null_backend_get_shapes() -> None:
    comm = NullCommunicator(_Pair())
    assert (comm.rank, comm.world_size, comm.transport) == (1, 2, "null")
    x = torch.empty(4, 3, device="meta")
    assert comm.all_reduce(x) is x
    assert comm.all_gather(x).shape == (4, 6)
    assert comm.all_gather(x, 0).shape == (8, 3)
    assert comm.reduce_scatter(x).shape == (2, 3)
    assert comm.all_to_all(x, [1, 3], [2, 5]).shape == (7, 3)
