"""torch_npu on the simulated runtime: devices, memory, streams, events, the ledger and plain aten operators."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyaccel_cannsim.aten import ALLOWED, in_use
from polyaccel_cannsim.descriptor import bytes_at
from polyaccel_cannsim.ledger import Ledger
from polyaccel_cannsim.simulator import Simulator

npu: Any = getattr(torch, "npu", None)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor of the card as they are now, without any synchronisation."""
    return bytes_at(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def late(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor + 1``, queued; the streams of the tests' process sleep until somebody waits."""
    return torch.add(tensor, 1)


@pytest.fixture(autouse=True)
def _quiet(cannsim: Simulator) -> Any:
    npu.synchronize()
    cannsim.set_quiet(-1)
    yield
    cannsim.set_quiet(cannsim.settings.quiet_ms)
    npu.synchronize()


def test_the_cards_are_those_of_the_settings(cannsim: Simulator) -> None:
    assert npu.device_count() == cannsim.settings.devices
    assert npu.get_device_name(0) == cannsim.settings.soc.name
    free, total = npu.mem_get_info(0)
    assert total == cannsim.settings.memory
    assert 0 <= free <= total


def test_a_tensor_comes_back_from_every_card(cannsim: Simulator) -> None:
    for index in range(npu.device_count()):
        x = torch.arange(12, dtype=torch.float32).view(3, 4).to(f"npu:{index}")
        assert x.device == torch.device("npu", index)
        assert torch.equal(x.cpu(), torch.arange(12, dtype=torch.float32).view(3, 4))
        assert torch.equal(x.t()[1:].cpu(), torch.arange(12, dtype=torch.float32).view(3, 4).t()[1:])


def test_an_empty_tensor_is_of_every_card_and_touches_none(cannsim: Simulator) -> None:
    empty = torch.zeros((3, 2, 0), device="npu:0")
    npu.synchronize()
    assert empty.cpu().shape == (3, 2, 0)


def test_memory_is_counted_by_card(cannsim: Simulator) -> None:
    last = npu.device_count() - 1
    npu.synchronize()
    before = [cannsim.memory_used(index) for index in range(npu.device_count())]
    x = torch.empty(64 << 20, dtype=torch.uint8, device=f"npu:{last}")
    after = [cannsim.memory_used(index) for index in range(npu.device_count())]
    assert after[last] - before[last] >= 64 << 20
    assert after[:last] == before[:last]
    assert cannsim.device_of(x.data_ptr(), 64 << 20) == last
    del x
    npu.empty_cache()
    assert cannsim.memory_used(last) < after[last]


def test_a_result_is_stale_until_its_stream_is_synchronised(cannsim: Simulator) -> None:
    x = torch.zeros(8, device="npu")
    y = torch.zeros(8, device="npu")
    npu.synchronize()
    y.copy_(late(x))
    stream = npu.current_stream().npu_stream
    assert cannsim.pending(stream) >= 2
    assert torch.equal(raw(y), torch.zeros(8))
    npu.current_stream().synchronize()
    assert cannsim.pending(stream) == 0
    assert torch.equal(raw(y), torch.ones(8))


def test_a_copy_to_pinned_memory_waits_for_its_stream(cannsim: Simulator) -> None:
    x = torch.ones(8, device="npu")
    host = torch.zeros(8).pin_memory()
    npu.synchronize()
    host.copy_(late(x), non_blocking=True)
    assert torch.equal(host, torch.zeros(8))
    npu.synchronize()
    assert torch.equal(host, torch.full((8,), 2.0))


def test_only_a_stream_that_waits_for_the_event_reads_new_bytes(
    cannsim: Simulator,
) -> None:
    side = npu.Stream()
    for waits, expected in ((False, 0.0), (True, 1.0)):
        x, y, seen = (torch.zeros(8, device="npu") for _ in range(3))
        npu.synchronize()
        y.copy_(late(x))
        ready = npu.Event()
        ready.record()
        with npu.stream(side):
            if waits:
                side.wait_event(ready)
            seen.copy_(y)
        side.synchronize()
        assert raw(seen)[0] == expected
        npu.synchronize()


def test_an_event_is_ready_after_what_it_marks(cannsim: Simulator) -> None:
    x = torch.zeros(8, device="npu")
    npu.synchronize()
    y = late(x)
    event = npu.Event()
    event.record()
    late(y)
    event.synchronize()
    assert event.query()
    assert torch.equal(raw(y), torch.ones(8))
    assert cannsim.pending(npu.current_stream().npu_stream) >= 1


def test_polling_an_event_makes_progress(cannsim: Simulator) -> None:
    x = torch.zeros(8, device="npu")
    y = late(x)
    event = npu.Event()
    event.record()
    for _ in range(10_000):
        if event.query():
            break
        time.sleep(0.001)
    assert event.query()
    assert torch.equal(raw(y), torch.ones(8))


def test_a_stream_left_alone_runs_by_itself(cannsim: Simulator) -> None:
    cannsim.set_quiet(5)
    x = torch.zeros(8, device="npu")
    y = late(x)
    stream = npu.current_stream().npu_stream
    for _ in range(1000):
        if not cannsim.pending(stream):
            break
        time.sleep(0.005)
    assert torch.equal(raw(y), torch.ones(8))


def test_streams_of_two_cards_are_two_queues(cannsim: Simulator) -> None:
    if npu.device_count() < 2:
        pytest.skip("one card")
    a, b = torch.zeros(4, device="npu:0"), torch.zeros(4, device="npu:1")
    npu.synchronize(0)
    npu.synchronize(1)
    a2, b2 = late(a), late(b)
    npu.synchronize(1)
    assert raw(b2)[0] == 1
    assert cannsim.pending(npu.current_stream(0).npu_stream) >= 1
    assert torch.equal(a2.cpu(), torch.ones(4))


def test_the_ledger_holds_what_torch_npu_handed_over(cannsim: Simulator, cann_ledger: Ledger) -> None:
    import torch_npu

    x = torch.randn(6, 16).half().npu()[::2]
    gamma = torch.ones(16).half().npu()
    cann_ledger.reset()
    torch_npu.npu_rms_norm(x, gamma, 1e-5)
    npu.synchronize()
    (call,) = (one for one in cann_ledger if one.name == "aclnnRmsNorm")
    assert (call.device, call.captured, call.refused) == (0, False, 0)
    assert call.stream >= 0
    first = call.tensors[0]
    assert (first.shape, first.stride, first.dtype, first.contiguous) == ((3, 16), (32, 1), torch.float16, False)
    assert call.arguments[2] == 1e-5
    assert "float16[3, 16] stride [32, 1]" in call.line()
    assert cann_ledger.counts()["aclnnRmsNorm"] == 1


def test_every_allowed_aten_operator_exists_and_steps_back_for_aclnn(cannsim: Simulator) -> None:
    for one in ALLOWED.values():
        base, _, overload = one.name.removeprefix("aten::").partition(".")
        assert getattr(getattr(torch.ops.aten, base), overload or "default")
        assert one.reason
        assert all(name.startswith("aclnn") for name in one.aclnn)
    left = {one.name for one in in_use(cannsim.rules)}
    served = {name for name, one in ALLOWED.items() if set(one.aclnn) <= set(cannsim.rules)}
    assert left | served == set(ALLOWED)
    assert not left & served
    assert {one.name for one in in_use({})} == set(ALLOWED)


def test_an_aten_operator_of_the_list_is_in_the_ledger(cannsim: Simulator, cann_ledger: Ledger) -> None:
    x = torch.tensor([6, 5, 3], dtype=torch.int32, device="npu")
    cann_ledger.reset()
    assert torch.equal((x & 3).cpu(), torch.tensor([2, 1, 3], dtype=torch.int32))
    assert [name for name in cann_ledger.names() if "and" in name.lower()] in (
        ["aten::bitwise_and.Scalar"],
        ["aclnnBitwiseAndScalar"],
    )


def test_operands_of_two_cards_are_refused_in_torchs_words(cannsim: Simulator) -> None:
    if npu.device_count() < 2 or "aten::bitwise_and.Tensor" not in {one.name for one in in_use(cannsim.rules)}:
        pytest.skip("one card, or no operator of the list to ask")
    a, b = (torch.ones(2, dtype=torch.int32, device=f"npu:{i}") for i in range(2))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.bitwise_and(a, b)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.bitwise_and(a, torch.ones(2, dtype=torch.int32))


_OPERATIONS: dict[str, Any] = {
    "slice and add": lambda x: x[1:, ::2] + 1,
    "transposed product": lambda x: x.t() * x.t(),
    "in place": lambda x: x.clone().mul_(2),
    "concatenate": lambda x: torch.cat([x, x.flip(0) if x.device.type == "cpu" else x.cpu().flip(0).to(x.device)]),
    "where": lambda x: torch.where(x > 0, x, -x),
    "masked": lambda x: x.masked_fill(x > 0, 2),
    "largest": lambda x: x.amax(-1),
    "sum": lambda x: (x * 4).round().sum(0) if x.device.type == "cpu" else (x * 4).cpu().round().to(x.device).sum(0),
    "which": lambda x: x.argmax(-1),
    "sorted": lambda x: x.sort(dim=-1, stable=True)[0],
    "rows": lambda x: x.index_select(0, torch.zeros(3, dtype=torch.int64, device=x.device)),
    "positions": lambda x: torch.arange(x.shape[0], device=x.device) * 2,
    "cast": lambda x: x.to(torch.float16).float(),
    "found": lambda x: (x > 0).nonzero(),
    "stacked": lambda x: torch.stack([x, x], 1),
    "padded": lambda x: torch.nn.functional.pad(x, (1, 2)),
    "bits": lambda x: (x * 8).to(torch.int32) >> 1,
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # there is one machine in the process
@given(st.sampled_from(sorted(_OPERATIONS)), st.integers(2, 6), st.integers(2, 9), st.integers(0, 2**31))
def test_plain_operators_agree_with_the_cpu(cannsim: Simulator, name: str, rows: int, columns: int, seed: int) -> None:

    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = _OPERATIONS[name](x)
    torch.testing.assert_close(_OPERATIONS[name](x.npu()).cpu(), expected, rtol=1e-6, atol=1e-6)
