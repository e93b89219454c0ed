"""A backend from a table of callables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyaccel.backend import Plan, SiteRequest, TableBackend, TokenClass, TorchDevice, WeightSpec
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.step import DEVICE_ARRAYS, AdapterRows, DeviceState, StepInput
from polyaccel.backend.weight import Slice
from tests.backend.steps import KeyedStep

SPEC = WeightSpec(site="s", slices=(Slice(name="s", n=2),), k=3, dtype=torch.float32)


def test_a_name_outside_the_vocabulary_is_refused_with_the_vocabulary() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown operators \['rmsnorm', 'sgemv'\].*'rms_norm'") as caught:
        TableBackend("cpu", {"sgemv": len, "rmsnorm": len, "gelu": len})
    assert "qkv_rope_cache" in str(caught.value)


def test_a_first_operator_runs_and_the_rest_is_there() -> None:
    backend = TableBackend("cpu", {"gelu": lambda x, approximate: x * 0})
    plan = Plan(backend, [SiteRequest(site="g", operator="gelu"), SiteRequest(site="s", operator="silu_and_mul")])
    step = KeyedStep()
    gelu = plan["g"][step](torch.ones(1, 2), "none")
    assert isinstance(gelu, torch.Tensor)
    assert gelu.tolist() == [[0.0, 0.0]]
    silu = plan["s"][step](torch.zeros(1, 2))
    assert isinstance(silu, torch.Tensor)
    assert silu.tolist() == [[0.0]]
    weight = backend.allocate_weight(SPEC, backend.devices()[0])
    weight.write(0, torch.eye(2, 3))
    weight.seal()
    assert backend.dequantize(weight).tolist() == torch.eye(2, 3).tolist()


def test_the_mandatory_operators_can_be_replaced() -> None:
    backend = TableBackend("cpu", {"linear": len})
    assert backend.table()["linear"][0].fn is len
    assert set(backend.table()) == {"linear", "dequantize"}


def test_changing_the_table_afterwards_changes_nothing() -> None:
    table = {"gelu": len}
    backend = TableBackend("cpu", table)
    table["sgmv"] = len
    assert set(backend.table()) == {"linear", "dequantize", "gelu"}


def test_a_device_is_taken_by_name_or_as_it_is() -> None:
    device = TorchDevice("meta", index=1)
    assert TableBackend(device, {}).devices() == (device,)
    assert TableBackend("meta", {}, name="mine").devices()[0].torch_device == torch.device("meta")
    assert TableBackend("cpu", {}, name="mine").name == "mine"


def test_a_device_that_does_not_allocate_is_not_usable_and_says_why() -> None:
    class Broken(TorchDevice):
        def empty(self, shape: object, dtype: torch.dtype) -> torch.Tensor:
            raise RuntimeError("no driver")

    availability = TableBackend(Broken("cpu", name="x:0"), {}).probe()
    assert not availability.usable
    assert availability.reason == "x:0 does not allocate: no driver"
    assert TableBackend("cpu", {}).probe().usable


def test_a_table_is_never_chosen_by_itself_and_does_not_capture_graphs() -> None:
    backend = TableBackend("cpu", {})
    assert backend.priority is None
    (reason,) = backend.graph_refusals()
    assert "'table'" in reason


def test_the_plain_forms_of_the_mandatory_operators_come_with_their_evidence() -> None:
    table = TableBackend("cpu", {"silu_and_mul": torch.nn.functional.silu}).table()
    assert "aten::addmm" in table["linear"][0].evidence
    assert table["dequantize"][0].evidence
    assert table["silu_and_mul"][0].evidence == ()
    assert TableBackend("cpu", {"linear": lambda x, weight: x}).table()["linear"][0].evidence == ()


def test_on_a_device_a_steps_arrays_are_there_before_the_first_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TableBackend("meta", {})
    device = backend.devices()[0]
    rows = AdapterRows.build(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32))
    arrays = {name: np.zeros(1, np.float32 if name == "uniforms" else np.int64) for name in DEVICE_ARRAYS}
    inputs = StepInput(token_class=TokenClass.DECODE, adapters={"tokens": rows}, **arrays)
    step = backend.begin_step(inputs, DeviceState(), device)

    def late(*arguments: object) -> None:
        raise AssertionError("copied to the device by an operator")

    monkeypatch.setattr(type(device), "upload", late)
    for name in DEVICE_ARRAYS:
        if name != "token_ids":
            assert step.tensor(name).device.type == "meta"
    assert [part.device.type for part in step.adapter_tensors("tokens")] == ["meta"] * 3
