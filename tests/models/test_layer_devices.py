"""Layers spread over several devices of one backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyaccel.backend.communicator import SingleRank
from polyaccel.backend.device import TorchDevice
from polyaccel.backend.errors import ConfigurationError
from polyaccel.models.model import Model
from tests.models.families import FAMILIES, build, open_saved
from tests.models.peft_adapters import make, write_all
from tests.models.scenario import drive, random_tokens
from tests.support.driver import Mix, StepDriver
from tests.support.thread_comm import ThreadCommunicator, run_ranks


class CountingDevice(TorchDevice):
    """A device that counts what is copied to it while it is watched."""

    def __init__(self, index: int) -> None:
        super().__init__("cpu", index=index, name=f"part {index}")
        self.copies = 0

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.copies += 1
        super().copy_(destination, source)


def _devices(layout: Sequence[int]) -> tuple[CountingDevice, ...]:
    parts = {index: CountingDevice(index) for index in layout}
    return tuple(parts[index] for index in layout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [(0, 1, 1), (0, 1, 0), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_several_devices_give_the_same_bits(tmp_path: Path, family: str, layout: tuple[int, ...]) -> None:
    reference, checkpoint = open_saved(family, tmp_path / "model")
    adapters = make(reference, family, tmp_path)
    rank_rows = sum(adapter.rank for adapter in adapters)
    tokens = random_tokens(reference.config.vocab_size)
    mixes: dict[int, Mix] = {0: ((0, 1.0),), 2: ((1, 0.5),)}

    def logits(model: Model) -> dict[int, torch.Tensor]:
        driver = StepDriver(model, SingleRank(), slots=2)
        write_all(driver, adapters)
        return drive(driver, tokens, mixes)

    expected = logits(build(checkpoint, rank_rows=rank_rows))
    spread = logits(build(checkpoint, rank_rows=rank_rows, devices=_devices(layout)))
    assert all(torch.equal(spread[number], expected[number]) for number in expected)


def test_hidden_states_and_residual_are_copied_where_the_device_changes_and_nowhere_else(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    devices = _devices((0, 1, 0))
    driver = StepDriver(build(checkpoint, devices=devices), SingleRank())
    for device in devices:
        device.copies = 0
    driver.step({0: [1, 2, 3]})
    assert [device.copies for device in devices[:2]] == [2, 2]


def test_each_device_caches_its_own_layers_only(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    model = build(checkpoint, devices=_devices((0, 1, 0)), load=False)
    assert [device.index for device in model.devices] == [0, 1]
    assert [model.kv_spec(8, 16, torch.float32, index).layers for index in (0, 1)] == [2, 1]
    assert set(model.weights(0)) | set(model.weights(1)) == set(model.weights())
    assert set(model.weights(1)) == {f"layers.1.{name}" for name in ("qkv", "o", "gate_up", "down")}
    with pytest.raises(ConfigurationError, match="2 devices; say for which"):
        model.kv_spec(8, 16, torch.float32)
    with pytest.raises(ConfigurationError, match="no layer lies on device 5"):
        model.kv_spec(8, 16, torch.float32, 5)
    cache = model.options.backend.allocate_kv(model.kv_spec(8, 16, torch.float32, 0), model.devices[0])
    for caches in (cache, {0: cache}):
        with pytest.raises(ConfigurationError, match="each needs its own KV cache"):
            model.bind_kv(caches)


def test_tied_weights_on_different_devices_are_read_twice(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama3", tmp_path)
    together = build(checkpoint, devices=_devices((0, 1, 0))).weights()
    apart = build(checkpoint, devices=_devices((0, 0, 1)))
    assert together["lm_head"].spec.tied_to == "embedding"
    assert together["lm_head"].nbytes == 0
    weights = apart.weights()
    assert weights["lm_head"].spec.tied_to is None
    dequantize = apart.options.backend.dequantize
    assert torch.equal(dequantize(weights["lm_head"]), dequantize(weights["embedding"]))


def test_a_rank_may_itself_spread_its_layers(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama3", tmp_path)
    tokens = random_tokens(50)

    def rank(comm: ThreadCommunicator, layout: tuple[int, ...]) -> dict[int, torch.Tensor]:
        model = build(checkpoint, rank=comm.rank, world_size=2, devices=_devices(layout))
        return drive(StepDriver(model, comm), tokens)

    expected = run_ranks(2, lambda comm: rank(comm, (0, 0, 0)))[0]
    spread = run_ranks(2, lambda comm: rank(comm, (0, 1, 1)))[0]
    assert all(torch.equal(spread[number], expected[number]) for number in expected)


def test_one_device_a_layer_is_asked_for(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    options = build(checkpoint, load=False).options
    with pytest.raises(ConfigurationError, match="2 devices, the model has 3 layers"):
        replace(options, devices=_devices((0, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 of a world of 2"),
        ({"world_size": 0}, "rank 0 of a world of 0"),
        ({"dtype": torch.int8}, "torch.int8 is not supported"),
        ({"rank_rows": -1}, "rank_rows is -1"),
        ({"max_positions": 0}, "max_positions is 0"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        replace(build(checkpoint, load=False).options, **change)  # type: ignore[arg-type]
