"""Capture and replay of graphs: ``torch.npu.NPUGraph`` on recorded calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyaccel_cannsim.ledger import Ledger
from polyaccel_cannsim.simulator import Simulator

npu: Any = getattr(torch, "npu", None)


def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A norm and some arithmetic, as a decode step has."""
    import torch_npu

    normed, _ = torch_npu.npu_rms_norm(x, weight, 1e-6)
    return normed * 2 + 1


def operands(device: str = "npu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(4, 8).half().to(device), torch.randn(8).half().to(device)
    out = torch.zeros(4, 8, device=device, dtype=torch.float16)
    npu.synchronize()
    return x, weight, out


def captured(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Any:
    graph = npu.NPUGraph()
    with npu.graph(graph):
        out.copy_(step(x, weight))
    return graph


def test_a_capture_runs_nothing_and_a_replay_everything(cannsim: Simulator, cann_ledger: Ledger) -> None:
    x, weight, out = operands()
    expected = step(x, weight).cpu()
    cann_ledger.reset()
    graph = captured(x, weight, out)
    npu.synchronize()
    assert torch.equal(out.cpu(), torch.zeros(4, 8, dtype=torch.float16))
    recorded = [call.name for call in cann_ledger if call.captured]
    assert "aclnnRmsNorm" in recorded
    assert cann_ledger.counts()["aclnnRmsNorm"] == 0
    graph.replay()
    npu.synchronize()
    assert torch.equal(out.cpu(), expected)
    assert [call.name for call in cann_ledger if call.replayed] == recorded


def test_a_replay_reads_the_memory_as_it_is_then(cannsim: Simulator) -> None:
    x, weight, out = operands()
    graph = captured(x, weight, out)
    for _ in range(3):
        fresh = torch.randn(4, 8).half()
        x.copy_(fresh)
        graph.replay()
        npu.synchronize()
        assert torch.equal(out.cpu(), step(fresh.npu(), weight).cpu())


def test_replays_keep_their_order_with_work_around_them(cannsim: Simulator) -> None:
    x, weight, out = operands()
    graph = captured(x, weight, out)
    sums = []
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        sums.append(out + 0)
    x.fill_(3.0)
    npu.synchronize()
    for value, seen in zip((1.0, 2.0), sums, strict=True):
        assert torch.equal(seen.cpu(), step(torch.full((4, 8), value).half().npu(), weight).cpu())


def test_a_side_stream_joins_the_capture_by_events(cannsim: Simulator) -> None:
    x, weight, out = operands()
    side = npu.Stream()
    graph = npu.NPUGraph()
    with npu.graph(graph):
        side.wait_stream(npu.current_stream())
        with npu.stream(side):
            y = step(x, weight)
        npu.current_stream().wait_stream(side)
        out.copy_(y)
    npu.synchronize()
    assert not out.cpu().any()
    graph.replay()
    npu.synchronize()
    assert torch.equal(out.cpu(), step(x, weight).cpu())
    late = x + 1  # the side stream left the capture with it
    with npu.stream(side):
        side.wait_stream(npu.default_stream())
        again = late + 1
    npu.synchronize()
    assert torch.equal(again.cpu(), x.cpu() + 1 + 1)


def test_two_graphs_and_a_destroyed_one_do_not_touch_each_other(cannsim: Simulator) -> None:
    x, weight, out = operands()
    other = torch.zeros_like(out)
    first, second = captured(x, weight, out), captured(x, weight, other)
    second.reset()
    del second
    first.replay()
    npu.synchronize()
    assert out.cpu().any()
    assert not other.cpu().any()


def test_a_task_group_takes_new_host_values(cannsim: Simulator) -> None:
    begin, end = getattr(npu, "graph_task_group_begin", None), getattr(npu, "graph_task_group_end", None)
    if begin is None or end is None:
        pytest.skip("this torch_npu has no task groups")
    import torch_npu

    x, weight, out = operands()
    graph, side = npu.NPUGraph(), npu.Stream()
    rstd = torch.zeros(4, 1, device="npu")
    with npu.graph(graph):
        stream = npu.current_stream()
        begin(stream)
        rstd.copy_(torch_npu.npu_rms_norm(x, weight, 1e-6)[1])
        handle = end(stream)
        out.copy_(x)
    graph.replay()
    npu.synchronize()
    before = rstd.cpu()
    with npu.stream(side):
        npu.graph_task_update_begin(side, handle)
        rstd.copy_(torch_npu.npu_rms_norm(x, weight, 100.0)[1])
        npu.graph_task_update_end(side)
    npu.synchronize()
    assert torch.equal(rstd.cpu(), before)
    graph.replay()
    npu.synchronize()
    expected = torch.rsqrt(x.cpu().float().pow(2).mean(-1, keepdim=True) + 100.0)
    torch.testing.assert_close(rstd.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.cpu(), x.cpu())


def attention_operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, 1, 4, 64).half()
    cache = torch.randn(6, 128, 4 * 64).half()
    return q.npu(), cache.npu(), torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32).npu()


def attended(operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], lengths: list[int], **given: Any) -> Any:
    """Attention over pages, as a decode step asks for it."""
    q, cache, table = operands
    name = given.pop("name", "npu_fused_infer_attention_score")
    asked = getattr(torch.ops.npu, name)
    return (asked.out if "out" in given else asked)(
        q,
        cache,
        cache,
        actual_seq_lengths_kv=lengths,
        block_table=table,
        num_heads=4,
        num_key_value_heads=4,
        scale=0.125,
        input_layout="BSND",
        block_size=128,
        **given,
    )


def test_the_largest_workspace_is_told_before_a_capture_and_launches_nothing(
    cannsim: Simulator, cann_ledger: Ledger
) -> None:
    operands = attention_operands()
    npu.synchronize()
    cann_ledger.reset()
    workspace = attended(operands, [3, 5], name="_npu_fused_infer_attention_score_get_max_workspace")
    assert workspace.device.type == "npu"
    assert not cann_ledger.counts()


def test_lengths_that_change_between_replays_do_not_reach_the_replays_before(cannsim: Simulator) -> None:
    operands = attention_operands()
    wanted = {length: attended(operands, [length, length])[0].cpu() for length in (3, 200, 384)}
    out, lse = torch.zeros_like(operands[0]), torch.zeros(1, device="npu")
    graph, side, seen = npu.NPUGraph(), npu.Stream(), []
    with npu.graph(graph):
        stream = npu.current_stream()
        npu.graph_task_group_begin(stream)
        attended(operands, [3, 3], out=[out, lse])
        handle = npu.graph_task_group_end(stream)
    npu.synchronize()
    cannsim.set_quiet(-1)  # nothing runs before somebody waits for it
    try:
        for length in (3, 200, 384, 200):
            side.wait_stream(npu.current_stream())
            with npu.stream(side):
                npu.graph_task_update_begin(side, handle)
                attended(operands, [length, length], out=[out, lse])
                npu.graph_task_update_end(side)
            npu.current_stream().wait_stream(side)
            graph.replay()
            seen.append((length, out + 0))
    finally:
        cannsim.set_quiet(cannsim.settings.quiet_ms)
    npu.synchronize()
    for length, found in seen:
        assert torch.equal(found.cpu(), wanted[length]), length


def test_a_synchronisation_inside_a_capture_fails_as_on_a_card(program: Any) -> None:
    out = program(
        """
        import torch
        x = torch.zeros(4, device="npu")
        torch.npu.synchronize()
        try:
            with torch.npu.graph(torch.npu.NPUGraph()):
                (x + 1).cpu()
        except RuntimeError as problem:
            print("refused:", problem)
        """
    )
    assert "error code:107027" in out


def test_capture_is_refused_with_the_second_kind_of_task_queue(program: Any) -> None:
    out = program(
        """
        import torch
        x = torch.zeros(4, device="npu")
        try:
            with torch.npu.graph(torch.npu.NPUGraph()):
                x + 1
        except RuntimeError as problem:
            print("refused:", problem)
        """,
        TASK_QUEUE_ENABLE="2",
    )
    assert "ERR00007" in out
