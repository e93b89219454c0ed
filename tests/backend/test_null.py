"""The null backend: scripted tokens, fake latency, graphs, and no arithmetic."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyaccel.backend import (
    Backend,
    DeviceState,
    GraphKey,
    KVSpec,
    Plan,
    SampleOutput,
    SamplingRow,
    SamplingSpec,
    SingleRank,
    SiteRequest,
    Step,
)
from polyaccel.backend.null.backend import NullBackend, default_script
from polyaccel.models.model import Model
from polyaccel.weights.checkpoint import open_checkpoint
from tests.backend.composite.cases import step_input
from tests.models.families import FAMILIES, build, random_reference, save
from tests.support.driver import StepDriver

SPEC = SamplingSpec(request_slots=4, vocabulary=1000)


class NoArithmetic(TorchDispatchMode):
    """Fails on every dispatched operator with a tensor that has memory, allocation of such a tensor included."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        wrong = [str(tensor.device) for tensor in tensors if tensor.device.type != "meta"]
        assert not wrong, f"{func._schema.name} computes on {wrong}"
        return result


def _state(backend: Backend, **seeds: int) -> DeviceState:
    device = backend.devices()[0]
    sampling = backend.allocate_sampling(SPEC, device)
    for slot, seed in seeds.items():
        sampling.write(int(slot.removeprefix("slot")), SamplingRow(seed=seed))
    return DeviceState(sampling=sampling)


def _step(backend: Backend, state: DeviceState, positions: Sequence[int], slots: Sequence[int]) -> Step:
    rows = len(positions)
    inputs = step_input(
        [(1, p + 1) for p in positions],
        positions=positions,
        logits_rows=range(rows),
        sample_slots=slots,
        uniforms=[0.0] * rows,
    )
    return backend.begin_step(inputs, state, backend.devices()[0])


def _sample(backend: NullBackend, step: Step) -> np.ndarray:
    output = backend.scripted(step)
    assert isinstance(output, SampleOutput)
    return backend.devices()[0].download(output.ids).wait()


def test_tokens_are_a_function_of_the_requests_seed_and_the_tokens_position() -> None:
    seen: list[tuple[list[int], list[int], int]] = []

    def script(seeds: np.ndarray, positions: np.ndarray, vocabulary: int) -> np.ndarray:
        seen.append((seeds.tolist(), positions.tolist(), vocabulary))
        return positions * 10

    backend = NullBackend(script=script)
    state = _state(backend, slot1=11, slot3=33)
    assert _sample(backend, _step(backend, state, [4, 7], [3, 1])).tolist() == [50, 80]
    assert seen == [([33, 11], [5, 8], 1000)]


def test_the_default_script_stays_in_the_vocabulary_and_depends_on_seed_and_position() -> None:
    seeds = np.array([0, 1, 2**64 - 1, 5], dtype=np.uint64)
    ids = default_script(seeds, np.array([0, 1, 10**6, 7]), 97)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < 97
    positions = np.arange(50)
    streams = [default_script(np.full(50, seed, dtype=np.uint64), positions, 97).tolist() for seed in (3, 3, 4)]
    assert streams[0] == streams[1]
    assert streams[0] != streams[2]
    assert len(set(streams[0])) > 10


def test_results_are_there_when_the_fake_latency_has_passed_and_not_before() -> None:
    backend = NullBackend(latency=0.05)
    state = _state(backend, slot0=1)
    device = backend.devices()[0]
    begun = time.perf_counter()
    copies = [device.download(backend.scripted(_step(backend, state, [p], [0])).ids) for p in (0, 1)]
    event = device.record()
    for copy in copies:
        copy.wait()
    # The fake device's own clock, so this holds on any machine.
    assert time.perf_counter() - begun >= 0.1
    event.synchronize()
    assert event.query()


def test_an_event_after_work_that_goes_on_has_not_happened() -> None:
    backend = NullBackend(latency=3600.0)
    device = backend.devices()[0]
    before = device.record()
    backend.scripted(_step(backend, _state(backend, slot0=1), [0], [0]))
    assert before.query()
    assert not device.record().query()


def test_a_graph_replays_its_launches_and_the_script_of_the_step_it_is_given() -> None:
    backend = NullBackend()
    state = _state(backend, slot0=1, slot1=2)
    plan = Plan(backend, [SiteRequest(site="sample", operator="sample")], policy="strict")
    first, later = _step(backend, state, [0], [0]), _step(backend, state, [9], [1])

    def forward(step: Step) -> SampleOutput:
        output = plan["sample"][step](torch.empty(1, 1000, device="meta"), state.sampling, step)
        assert isinstance(output, SampleOutput)
        return output

    eager = forward(later).ids.tolist()
    assert backend.graph_refusals() == []
    graph = backend.capture(GraphKey(rows=1, rank_rows=0), forward, first)
    assert backend.ledger.counts() == {"null.sample": 1}
    assert graph.replay(later).ids.tolist() == eager
    assert backend.ledger.counts() == {"null.sample": 2}
    graph.close()
    assert NullBackend(graphs=False).graph_refusals() == ["switched off"]


def test_storage_holds_nothing() -> None:
    backend = NullBackend()
    device = backend.devices()[0]
    kv = backend.allocate_kv(
        KVSpec(layers=2, kv_heads=3, head_dim=4, dtype=torch.float32, blocks=9, block_size=16), device
    )
    assert kv.nbytes == 0
    k, v = kv.read(0, torch.zeros(5, dtype=torch.int64))
    assert (k.shape, v.shape, k.device.type) == ((5, 3, 4), (5, 3, 4), "meta")
    assert device.memory().free == 16 << 30
    assert device.upload(np.zeros((2, 3))).shape == (2, 3)


def _loaded(family: str, folder: str) -> Model:
    with open_checkpoint(folder) as checkpoint:
        backend = NullBackend()
        return build(checkpoint, backend=backend, devices=tuple(backend.devices()) * 3, rank_rows=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_a_whole_model_computes_nothing(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save(random_reference(family), tmp_path_factory.mktemp(family))
    driver = StepDriver(_loaded(family, str(folder)), SingleRank(), slots=2, policy="strict")
    mixes = {1: ((0, 1.0), (1, 0.5))}
    with NoArithmetic():
        logits = driver.step({0: [1, 2, 3], 1: [4, 5]}, last_only=True, mixes=mixes)
        assert logits.shape[0] == 2
        driver.step({0: [1], 1: [2]}, mixes=mixes)


def test_the_watch_on_arithmetic_sees_it() -> None:
    with NoArithmetic():
        torch.empty(2, device="meta") + 1
        with pytest.raises(AssertionError, match="aten::add computes on"):
            torch.add(*_CPU_OPERANDS)
        with pytest.raises(AssertionError, match="aten::empty"):
            torch.empty(2)


_CPU_OPERANDS = (torch.zeros(2), torch.zeros(2))
