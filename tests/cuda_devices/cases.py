"""What a rank on its own GPU tries: each function is one case, called by all ranks in the same order."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from tests.cuda_devices.given_up import GIVEN_UP
from tests.cuda_devices.rank import Rank

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (2, 5), (7, 129), (1, 4096), (33, 4608), (64, 8200), (300, 4096), (0, 5))
"""Sums of a few bytes, odd ones, of one program and many, beyond what one kernel takes, and empty."""


def connects(here: Rank) -> None:
    comm = here.comm
    print(f"transport {comm.transport}; sums: {comm.describe()}; refusal {comm.refusal!r}; hosted {comm.hosted!r}")
    assert (comm.transport, comm.hosted) == ("nccl", "")
    assert here.backend.graph_refusals() == []


def sums_small_ones_by_one_kernel(here: Rank) -> None:
    """Fails where symmetric memory is refused, with the reason: everything else works without it."""
    assert here.comm.threshold >= 8 << 10, here.comm.describe()
    here.backend.ledger.clear()
    here.comm.all_reduce(torch.ones(8, device=here.device.torch_device))
    here.comm.all_reduce(torch.ones(4 << 20, device=here.device.torch_device))
    counts = here.backend.ledger.counts()
    larger = "two_shot" if here.comm.two_shot_threshold >= 16 << 20 else "nccl"
    assert counts == {"cuda.one_shot_all_reduce": 1, f"cuda.{larger}_all_reduce": 1}, counts


def all_reduce(here: Rank) -> None:
    for dtype in DTYPES:
        for seed, shape in enumerate(SHAPES):
            parts = [here.drawn(shape, dtype, rank, seed) for rank in range(here.world)]
            x = parts[here.rank].clone()
            assert here.comm.all_reduce(x) is x
            here.device.synchronize()
            wanted = sum(part.double() for part in parts)
            bound = sum(part.double().abs() for part in parts) * here.world * torch.finfo(dtype).eps
            assert isinstance(wanted, torch.Tensor)
            assert ((x.double() - wanted).abs() <= bound).all(), f"{shape} {dtype}"
            if here.comm.by_one_shot(x) and x.numel():
                total = parts[0].float()
                for part in parts[1:]:
                    total = total + part.float()
                assert torch.equal(x, total.to(dtype)), f"{shape} {dtype}: not the sum in the order of ranks"
            here.same(x, f"{shape} {dtype}")


def all_reduce_of_views(here: Rank) -> None:
    whole = here.drawn((9, 64), torch.float32, here.rank)
    columns, offset = whole.clone()[:, 3:17], whole.clone().flatten()[1:100]
    for x in (columns, offset):
        before = x.clone()
        here.comm.all_reduce(x)
        wanted = before.clone()
        here.comm.all_reduce(wanted)
        assert torch.equal(x, wanted)


def back_to_back(here: Rank) -> None:
    for count in (100, 40_000, 4_000_000):
        x = torch.full((count,), here.rank + 1.0, device=here.device.torch_device)
        for _ in range(6):
            here.comm.all_reduce(x)
        here.device.synchronize()
        first = here.world * (here.world + 1) // 2
        assert (x == first * here.world**5).all(), count


def many_in_a_row(here: Rank) -> None:
    """Buffers are used in turn: a slower rank must never read what a faster one wrote for a later sum."""
    wrong = torch.zeros((), device=here.device.torch_device)
    for i in range(3000):
        if i % 300 == 150 and here.rank == (i // 300) % here.world:
            torch.cuda._sleep(3_000_000)  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        count = (8, 5000, 70_001)[i % 3]
        x = torch.full((count,), float(i % 50 + here.rank), device=here.device.torch_device)
        here.comm.all_reduce(x)
        wanted = here.world * (i % 50) + here.world * (here.world - 1) // 2
        wrong += (x != wanted).sum()
    here.device.synchronize()
    assert wrong.item() == 0


def all_gather(here: Rank) -> None:
    for dtype in (*DTYPES, torch.int64):
        for shape, dim in (((2, 3, 5), -1), ((2, 3, 5), 0), ((2, 3, 5), 1), ((64, 16000), -1), ((0, 4), -1), ((7,), 0)):
            parts = [(here.drawn(shape, torch.float32, rank) * 9).to(dtype) for rank in range(here.world)]
            got = here.comm.all_gather(parts[here.rank], dim)
            assert torch.equal(got, torch.cat(parts, dim)), f"{shape} {dim} {dtype}"


def reduce_scatter(here: Rank) -> None:
    for dtype in DTYPES:
        for rows in (0, 1, 5):
            parts = [here.drawn((rows * here.world, 7), dtype, rank).round() for rank in range(here.world)]
            got = here.comm.reduce_scatter(parts[here.rank])
            total = torch.stack(parts).sum(0)[here.rank * rows : (here.rank + 1) * rows]
            assert torch.equal(got, total), f"{rows} {dtype}"


def all_to_all(here: Rank) -> None:
    world = here.world
    for counts in (
        [[2] * world] * world,
        [[(2 * i + 3 * j) % 4 for j in range(world)] for i in range(world)],
        [[3 * (i == j) for j in range(world)] for i in range(world)],
        [[3 * (i == 0) for j in range(world)] for i in range(world)],
        [[0] * world] * world,
    ):
        sent = [here.drawn((sum(counts[r]), 5), torch.bfloat16, r) for r in range(world)]
        receive = [counts[r][here.rank] for r in range(world)]
        got = here.comm.all_to_all(sent[here.rank], counts[here.rank], receive)
        parts = [part.split(counts[r])[here.rank] for r, part in enumerate(sent)]
        assert torch.equal(got, torch.cat(parts)), counts


def broadcast(here: Rank) -> None:
    for source in range(here.world):
        for dtype in (*DTYPES, torch.int64):
            parts = [(here.drawn((3, 5), torch.float32, rank) * 9).to(dtype) for rank in range(here.world)]
            x = parts[here.rank].clone()
            assert here.comm.broadcast(x, source) is x
            assert torch.equal(x, parts[source])


def barrier(here: Rank) -> None:
    time.sleep(0.3 * here.rank)
    came = time.time()
    here.comm.barrier()
    left = time.time()
    times = [moment for moment in here.comm.gather_objects((came, left)) if isinstance(moment, tuple)]
    assert min(moment[1] for moment in times) >= max(moment[0] for moment in times)


def objects(here: Rank) -> None:
    assert here.comm.gather_objects({"rank": here.rank}) == [{"rank": rank} for rank in range(here.world)]


def on_another_stream_and_device(here: Rank) -> None:
    other = torch.device("cuda", (here.rank + 1) % here.world)
    stream = torch.cuda.Stream(here.device.torch_device)  # type: ignore[no-untyped-call]
    x = torch.full((5000,), here.rank + 1.0, device=here.device.torch_device)
    here.device.synchronize()
    with torch.cuda.stream(stream):
        here.comm.all_reduce(x)
    stream.synchronize()
    wanted = here.world * (here.world + 1) / 2
    assert (x == wanted).all()
    with torch.cuda.device(other):
        here.comm.all_reduce(x)
        assert torch.cuda.current_device() == other.index
    here.device.synchronize()
    assert (x == wanted * here.world).all()


def two_groups_do_not_mix(here: Rank) -> None:
    other = here.group(60.0)
    x = torch.full((5000,), here.rank + 1.0, device=here.device.torch_device)
    y = torch.full((300,), 10.0 * (here.rank + 1), device=here.device.torch_device)
    for _ in range(3):
        here.comm.all_reduce(x)
        other.all_reduce(y)
    here.device.synchronize()
    first = here.world * (here.world + 1) / 2 * here.world**2
    assert (x == first).all()
    assert (y == 10 * first).all()
    other.close()


def graphs(here: Rank) -> None:
    """Sums of three sizes, a gather and an eager sum between, replayed 20 times with other data."""
    device = here.device.torch_device
    inputs = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in ((1, 4128), (32, 4608), (700, 4096))]
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def step() -> list[torch.Tensor]:
        sums = []
        for x in inputs:
            y = x * 2
            here.comm.all_reduce(y)
            here.comm.all_reduce(y)
            sums.append(y)
        return [*sums, here.comm.all_gather(inputs[0], -1)]

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = step()
    for turn in range(20):
        for i, x in enumerate(inputs):
            x.copy_(here.drawn(tuple(x.shape), torch.bfloat16, here.rank, 10 * turn + i))
        eager = [y.clone() for y in step()]
        kept = [tuple(x.shape) for x in inputs]
        graph.replay()
        here.comm.issued()
        here.device.synchronize()
        for got, wanted, shape in zip(outputs, eager, [*kept, kept[0]], strict=True):
            assert torch.equal(got, wanted), f"turn {turn}, {shape}"
    here.same(outputs[1], "after 20 replays")
    del outputs
    graph.reset()


def by_shares(here: Rank) -> None:
    """Two-shot sums of few programs and of many, of sizes that change from call to call."""
    ours = here.comm._one_shot
    assert ours is not None, here.comm.describe()
    for dtype in DTYPES:
        for count, programs in (
            (1, 64),
            (5000, 64),
            (70_001, 1),
            (1 << 20, 16),
            (3_000_001, 64),
            (4097, 3),
            (2048, 64),
        ):
            parts = [here.drawn((count,), dtype, rank, count) for rank in range(here.world)]
            x = parts[here.rank].clone()
            for _ in range(3):
                total = parts[0].float()
                for part in parts[1:]:
                    total = total + part.float()
                parts = [total.to(dtype)] * here.world
                ours.two_shot(x, programs)
            here.device.synchronize()
            assert torch.equal(x, parts[0]), f"{count} {dtype} by {programs}"


def adds_and_norms_in_one_kernel(here: Rank) -> None:
    """The sum followed by the kernel that adds and norms, on a side stream and in a graph too."""
    from polyaccel_cuda.kernels.norm import rms_norm

    device = here.device.torch_device
    for dtype in DTYPES:
        for rows, n in ((1, 4096), (3, 130), (64, 4096), (16, 8192), (2, 5), (128, 1000)):
            x = here.drawn((rows, n + 24), dtype, here.rank)[:, :n]
            residual, weight = here.drawn((rows, n), dtype, 50), here.drawn((n,), dtype, 51)
            if not here.comm.adds_and_norms(x, n):
                continue
            # A row alone is contiguous whatever its stride, and would be summed in place.
            summed = x.clone(memory_format=torch.contiguous_format)
            here.comm.all_reduce(summed)
            wanted = rms_norm(summed, weight, 1e-5, residual)
            for turn in range(3):
                got = here.comm.sum_add_norm(x, residual, weight, 1e-5)
                here.device.synchronize()
                assert wanted[1] is not None
                assert torch.equal(got[1], wanted[1]), f"{rows} x {n} {dtype}, turn {turn}: total"
                # The two kernels add the squares in different orders: a few roundings of float32, or one of x's dtype.
                close = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
                torch.testing.assert_close(got[0], wanted[0], rtol=close, atol=0.0)
            here.same(got[0], f"{rows} x {n} {dtype}")
    x, residual, weight = (
        torch.zeros(8, 4096, device=device),
        torch.zeros(8, 4096, device=device),
        torch.ones(4096, device=device),
    )
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    here.device.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = here.comm.sum_add_norm(x, residual, weight, 1e-5)
    for turn in range(20):
        x.copy_(here.drawn((8, 4096), torch.float32, here.rank, turn))
        wanted = here.comm.sum_add_norm(x, residual, weight, 1e-5)
        graph.replay()
        here.comm.issued()
        here.device.synchronize()
        assert torch.equal(captured[0], wanted[0]), f"turn {turn}"
    graph.reset()


def parts_of_products(here: Rank) -> None:
    """The sum of the parts' products; the same in 20 runs, on any current device, on a side stream, in a graph that is
    replayed with other data, with a rank that is late."""
    device = here.device.torch_device
    other = torch.device("cuda", (here.rank + 1) % here.world)
    for dtype, rows, k, n in (
        (torch.bfloat16, 1600, 512, 8192),
        (torch.float16, 3100, 256, 4104),
        (torch.float32, 1600, 64, 4112),
    ):
        starts = here.comm.parts(rows, n, dtype)
        assert len(starts) > 2, (rows, n)
        weights = [here.drawn((n, k), dtype, rank, 3) for rank in range(here.world)]
        x = torch.zeros(rows, k, dtype=dtype, device=device)
        y = torch.empty(rows, n, dtype=dtype, device=device)

        def produce(begin: int, end: int) -> None:
            torch.mm(x[begin:end], weights[here.rank].T, out=y[begin:end])  # noqa: B023

        def call() -> torch.Tensor:
            here.comm.sum_in_parts(y, starts, produce)  # noqa: B023
            return y  # noqa: B023

        def wanted(turn: int) -> torch.Tensor:
            summands = []
            for rank in range(here.world):
                its = here.drawn((rows, k), dtype, rank, turn)  # noqa: B023
                summands.append(torch.cat([its[i:j] @ weights[rank].T for i, j in pairwise(starts)]))  # noqa: B023
            total = summands[0].float()
            for summand in summands[1:]:
                total = total + summand.float()
            return total.to(dtype)  # noqa: B023

        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        before = torch.cuda.memory_allocated(other)
        for turn in range(6):
            x.copy_(here.drawn((rows, k), dtype, here.rank, turn))
            if here.rank == turn % here.world:
                torch.cuda._sleep(2_000_000)  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            if turn % 3 == 1:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    call()
                torch.cuda.current_stream().wait_stream(stream)
            elif turn % 3 == 2:
                with torch.cuda.device(other):
                    call()
                    assert torch.cuda.current_device() == other.index
            else:
                call()
            got = y.clone()
            here.device.synchronize()
            good = wanted(turn)
            if here.comm.describe_parts() == "pushed":
                assert torch.equal(got, good), f"{rows} x {n} {dtype}, turn {turn}"
            assert (got.double() - good.double()).abs().max() < 0.5
            here.same(got, f"{rows} x {n} {dtype}")
        first = y.clone()
        for _ in range(20):
            assert torch.equal(call(), first), "another sum in another run"
        assert torch.cuda.memory_allocated(other) == before
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
        for turn in range(10, 16):
            x.copy_(here.drawn((rows, k), dtype, here.rank, turn))
            eager = call().clone()
            y.zero_()
            graph.replay()
            here.comm.issued()
            here.device.synchronize()
            assert torch.equal(y, eager), f"replay {turn} of {rows} x {n} {dtype}"
        graph.reset()


def the_first_group_still_works(here: Rank) -> None:
    back_to_back(here)


def layers_in_prefill(here: Rank) -> None:
    _layers(here, "prefill")


def layers_in_decode(here: Rank) -> None:
    _layers(here, "decode")


def _layers(here: Rank, phase: str) -> None:
    """Every rank's station on what the ranks really handed on, against the reference of the uncut layer."""
    from polyaccel_conformance.bench import Bench
    from tests.support.large_layers import enlarged, prove, rank_bench

    bench = rank_bench(Bench(here.backend, here.device), here.comm, here.folder)
    with enlarged():
        found = prove(bench, "7B", phase, "all")
    print(", ".join(f"{station} {worst:.2f}" for station, worst in found.worst.items()))
    assert found.failure is None, found.failure


LAYERS = (layers_in_prefill, layers_in_decode)
ALL = (
    connects,
    sums_small_ones_by_one_kernel,
    all_reduce,
    all_reduce_of_views,
    back_to_back,
    many_in_a_row,
    all_gather,
    reduce_scatter,
    all_to_all,
    broadcast,
    barrier,
    objects,
    on_another_stream_and_device,
    two_groups_do_not_mix,
    graphs,
    by_shares,
    adds_and_norms_in_one_kernel,
    parts_of_products,
    *GIVEN_UP,
    the_first_group_still_works,
)
