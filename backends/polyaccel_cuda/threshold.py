"""Up to which size a sum over ranks is faster by our own kernel than by NCCL: tried and measured when ranks connect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from polyaccel.backend import CommunicationError
from polyaccel_cuda.nccl import NcclGroup
from polyaccel_cuda.symmetric import OneShot

SIZES = (8 << 10, 32 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20)
"""Bytes."""
LARGER_SIZES = (2 << 20, 4 << 20, 8 << 20, 16 << 20)
"""Of two-shot sums, which begin where one-shot ends."""
CALLS = 20
"""In one graph, so that what is timed is neither the host nor one launch."""
REPEATS = 5

Sum = Callable[[torch.Tensor], None]
"""In place."""


def largest_winning(sizes: Mapping[int, tuple[float, float]]) -> int:
    """The largest of the sizes, in bytes, at which, and below which, ours takes no longer; 0 if none.

    Args:
        sizes: seconds by size: ours, NCCL's.
    """
    found = 0
    for size, (ours, theirs) in sorted(sizes.items()):
        if ours > theirs:
            break
        found = size
    return found


def measured_threshold(
    device: torch.device, rank: int, world_size: int, one_shot: OneShot, nccl: NcclGroup, issued: Callable[[], None]
) -> int:
    """Compare sums with NCCL's, then speeds in graphs; called by all ranks together, with the device current.

    ``issued`` is told when kernels are on their way for which the host is about to wait.

    Raises:
        CommunicationError: other sums than NCCL's.
        RuntimeError: as torch reports it.
    """
    return _measured(device, rank, world_size, SIZES, one_shot.all_reduce, nccl, issued)


def measured_two_shot(
    device: torch.device, rank: int, world_size: int, one_shot: OneShot, nccl: NcclGroup, issued: Callable[[], None]
) -> int:
    """The same for larger sums by two-shot; before, what two ranks push is compared too."""
    sizes = [size for size in LARGER_SIZES if size <= one_shot.two_shot_bytes]
    if not sizes:
        return 0
    if one_shot.pushes:

        def pushed(x: torch.Tensor) -> None:
            half = x.numel() // 16 * 8
            for slot, part in enumerate((x[:half], x[half:])):
                one_shot.push(part, slot)
                one_shot.meet()
                one_shot.add_received(part, slot)

        _compare(device, rank, world_size, sizes, pushed, nccl, issued)
    return _measured(device, rank, world_size, sizes, one_shot.two_shot, nccl, issued)


def _measured(
    device: torch.device,
    rank: int,
    world_size: int,
    sizes: Sequence[int],
    ours: Sum,
    nccl: NcclGroup,
    issued: Callable[[], None],
) -> int:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _compare(device, rank, world_size, sizes, ours, nccl, issued)
        seconds: dict[int, tuple[float, float]] = {}
        for size in sizes:
            x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
            own = _seconds(functools.partial(ours, x), stream, issued)
            seconds[size] = (own, _seconds(functools.partial(nccl.all_reduce, x), stream, issued))
    torch.cuda.current_stream().wait_stream(stream)
    return largest_winning(seconds)


def _compare(
    device: torch.device,
    rank: int,
    world_size: int,
    sizes: Sequence[int],
    ours: Sum,
    nccl: NcclGroup,
    issued: Callable[[], None],
) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (4097, sizes[-1] // 4):
            # Integers so small that sums of sums are exact in every dtype and order.
            x = ((torch.arange(count, device=device) + 3 * rank) % 5).to(dtype)
            y = x.clone()
            for _ in range(2):
                ours(x)
                nccl.all_reduce(y)
            issued()
            if not torch.equal(x, y):
                raise CommunicationError(f"{count} numbers of {dtype} over {world_size} ranks: other sums than NCCL's")


def _seconds(call: Callable[[], None], stream: torch.cuda.Stream, issued: Callable[[], None]) -> float:
    call()
    issued()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    best = float("inf")
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        graph.replay()
        end.record(stream)
        issued()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / CALLS)
    graph.reset()
    return best
