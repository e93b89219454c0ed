"""Groups of ranks that one of them stays away from, or gives up: what the others then learn, and when."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from polyaccel.backend import CommunicationError
from polyaccel_cuda.communicator import CudaCommunicator
from tests.cuda_devices.rank import Rank

SHORT = 3.0
SLACK = 10.0
LONG = 60.0
"""Of groups that nobody may have to wait for."""


def withheld_from_a_product(here: Rank) -> None:
    def call(group: CudaCommunicator) -> None:
        y = torch.ones(2048, 8192, dtype=torch.bfloat16, device=here.device.torch_device)
        group.sum_in_parts(y, group.parts(2048, 8192, torch.bfloat16), lambda begin, end: None)

    _withheld(here, call)


def withheld_from_a_norm(here: Rank) -> None:
    def call(group: CudaCommunicator) -> None:
        x = torch.ones(4, 512, device=here.device.torch_device)
        assert group.adds_and_norms(x, 512)
        group.sum_add_norm(x, x, x[0], 1e-5)

    _withheld(here, call)


def withheld_from_a_small_sum(here: Rank) -> None:
    _withheld(here, lambda group: group.all_reduce(torch.ones(100, device=here.device.torch_device)))


def withheld_from_a_large_sum(here: Rank) -> None:
    _withheld(here, lambda group: group.all_reduce(torch.ones(4 << 20, device=here.device.torch_device)))


def withheld_from_a_gather(here: Rank) -> None:
    _withheld(here, lambda group: group.all_gather(torch.ones(100, device=here.device.torch_device)))


def withheld_from_a_graph(here: Rank) -> None:
    # Whoever was withheld before may still be closing that group, for longer than the short timeout.
    here.comm.barrier()
    group = here.group(SHORT)
    x = torch.ones(100, device=here.device.torch_device)
    stream = torch.cuda.Stream(here.device.torch_device)  # type: ignore[no-untyped-call]
    group.all_reduce(x)
    here.device.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(5):
            group.all_reduce(x)

    def replayed(_: CudaCommunicator) -> None:
        graph.replay()
        group.issued()

    _withheld(here, replayed, group, graph.reset)


def _withheld(
    here: Rank,
    call: Callable[[CudaCommunicator], object],
    group: CudaCommunicator | None = None,
    before_closing: Callable[[], object] = lambda: None,
) -> None:
    here.comm.barrier()
    group = group or here.group(SHORT)
    here.comm.barrier()
    if here.rank == here.world - 1:
        here.comm.gather_objects("stayed away")
        before_closing()
        group.close()
        return
    begun = time.monotonic()
    error = ""
    try:
        call(group)
        here.device.synchronize()
    except CommunicationError as raised:
        error = str(raised)
    waited = time.monotonic() - begun
    here.comm.gather_objects("gave up")
    again = ""
    try:
        group.all_reduce(torch.ones(3, device=here.device.torch_device))
    except CommunicationError as raised:
        again = str(raised)
    before_closing()
    group.close()
    here.device.synchronize()
    print(f"after {waited:.1f} s: {error}")
    assert "was given up after 3 s" in error
    assert error == again
    assert waited < SHORT + SLACK


def abandoned_before_a_small_sum(here: Rank) -> None:
    _abandoned(here, lambda group: group.all_reduce(torch.ones(100, device=here.device.torch_device)))


def abandoned_before_a_large_sum(here: Rank) -> None:
    _abandoned(here, lambda group: group.all_reduce(torch.ones(4 << 20, device=here.device.torch_device)))


def abandoned_before_a_product(here: Rank) -> None:
    def call(group: CudaCommunicator) -> None:
        y = torch.ones(2048, 8192, dtype=torch.bfloat16, device=here.device.torch_device)
        group.sum_in_parts(y, group.parts(2048, 8192, torch.bfloat16), lambda begin, end: None)

    _abandoned(here, call)


def abandoned_before_a_graph(here: Rank) -> None:
    here.comm.barrier()
    group = here.group(LONG)
    small, large = (torch.ones(count, device=here.device.torch_device) for count in (100, 4 << 20))
    stream = torch.cuda.Stream(here.device.torch_device)  # type: ignore[no-untyped-call]
    group.all_reduce(small)
    group.all_reduce(large)
    here.device.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(3):
            group.all_reduce(small)
            group.all_reduce(large)

    def replayed(_: CudaCommunicator) -> None:
        graph.replay()
        group.issued()

    _abandoned(here, replayed, group, graph.reset)


def abandoned_by_all(here: Rank) -> None:
    _abandoned(here, None)


def _abandoned(
    here: Rank,
    call: Callable[[CudaCommunicator], object] | None,
    group: CudaCommunicator | None = None,
    before_closing: Callable[[], object] = lambda: None,
) -> None:
    """The last rank gives up while the others wait for it; then all meet again, in a group like the one before."""
    here.comm.barrier()
    group = group or here.group(LONG)
    here.comm.barrier()
    begun = time.monotonic()
    error = ""
    if call is None:
        error = "were given up"
    elif here.rank == here.world - 1:
        time.sleep(0.5)
        error = "were given up"
    else:
        try:
            call(group)
            here.device.synchronize()
        except CommunicationError as raised:
            error = str(raised)
    group.abandon()
    waited = time.monotonic() - begun
    before_closing()
    group.close()
    here.device.synchronize()
    assert "were given up" in error, error
    assert waited < SLACK, waited
    begun = time.monotonic()
    again = here.group(LONG)
    print(f"let go after {waited:.2f} s, met again within {time.monotonic() - begun:.2f} s")
    assert (again.threshold, again.two_shot_threshold) == (group.threshold, group.two_shot_threshold)
    assert again.transport == "nccl"
    total = here.world * (here.world + 1) / 2
    for count in (100, 1 << 19, 4 << 20):
        x = torch.full((count,), here.rank + 1.0, device=here.device.torch_device)
        again.all_reduce(x)
        assert bool((x == total).all()), f"{count} numbers"
    again.barrier()
    here.device.synchronize()
    again.close()


GIVEN_UP = (
    withheld_from_a_small_sum,
    withheld_from_a_large_sum,
    withheld_from_a_gather,
    withheld_from_a_graph,
    withheld_from_a_product,
    withheld_from_a_norm,
    abandoned_before_a_small_sum,
    abandoned_before_a_large_sum,
    abandoned_before_a_product,
    abandoned_before_a_graph,
    abandoned_by_all,
)
