"""Operands of several devices are refused by name before anything runs."""

from __future__ import annotations

import pytest
import torch

from polyaccel.backend import (
    KVSpec,
    OperatorError,
    Plan,
    RopeTable,
    SiteRequest,
    Slice,
    TableBackend,
    TorchDevice,
    WeightSpec,
)
from polyaccel.backend.composite.kv_cache import TensorKVCache
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.placed import Placed, check_devices

CPU, META = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
SPEC = WeightSpec(site="w", slices=(Slice(name="w", n=4),), k=3, dtype=torch.float32)


def test_operands_of_one_device_pass_and_others_do_not_count() -> None:
    check_devices("linear", (CPU, TensorWeight(SPEC, TorchDevice("cpu")), 3, None), {"eps": 1.0}, ("x", "weight"))


def test_a_device_without_an_index_is_any_of_its_type() -> None:
    class Somewhere(Placed):
        def __init__(self, device: str) -> None:
            self.torch_device = torch.device(device)

    names = ("a", "b")
    check_devices("f", (Somewhere("cuda"), Somewhere("cuda:1")), {}, names)
    with pytest.raises(OperatorError, match="b is on cuda:1 but a is on cuda:0"):
        check_devices("f", (Somewhere("cuda:0"), Somewhere("cuda:1")), {}, names)


def test_a_weight_elsewhere_is_named_and_described() -> None:
    with pytest.raises(OperatorError, match="weight is on meta but x is on cpu") as caught:
        check_devices("linear", (CPU, TensorWeight(SPEC, TorchDevice("meta"))), {}, ("x", "weight"), 3)
    assert caught.value.rank == 3
    assert [(o.name, o.shape, o.dtype, o.device) for o in caught.value.operands] == [
        ("x", (2, 3), "float32", "cpu"),
        ("weight", (4, 3), "float32", "meta"),
    ]


def test_a_cache_elsewhere_is_named() -> None:
    kv = TensorKVCache(
        KVSpec(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32, blocks=1, block_size=1), TorchDevice("meta")
    )
    with pytest.raises(OperatorError, match="kv is on meta but q is on cpu"):
        check_devices("paged_attention", (CPU,), {"kv": kv}, ("q",))


def test_tensors_inside_of_an_argument_are_named_with_it() -> None:
    rope = RopeTable(cos=CPU, sin=META, rotary_dim=6)
    with pytest.raises(OperatorError, match=r"rope\.sin is on meta but q is on cpu"):
        check_devices("rotary_embedding", (CPU, CPU, rope), {}, ("q", "k", "rope"))


def test_a_composite_is_not_entered_with_operands_of_two_devices() -> None:
    backend = TableBackend("cpu", {})
    plan = Plan(backend, [SiteRequest(site="n", operator="rms_norm")], policy="allow")
    with pytest.raises(OperatorError, match="weight is on meta but x is on cpu"):
        plan["n"].calls[0](CPU, META[0], 1e-5)
    assert "composite.rms_norm" not in backend.ledger.counts()


def test_a_native_implementation_is_not_entered_with_operands_of_two_devices() -> None:
    entered: list[str] = []

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
        entered.append("rms_norm")
        return x

    plan = Plan(TableBackend("cpu", {"rms_norm": norm}), [SiteRequest(site="n", operator="rms_norm")], policy="strict")
    with pytest.raises(OperatorError, match="weight is on meta but x is on cpu"):
        plan["n"].calls[0](CPU, META[0], 1e-5)
    with pytest.raises(OperatorError, match="residual is on meta but x is on cpu"):
        plan["n"].calls[0](CPU, CPU[0], 1e-5, residual=META)
    assert not entered


def test_an_argument_that_the_contract_does_not_know_is_named_by_its_place() -> None:
    with pytest.raises(OperatorError, match="argument 1 is on meta but x is on cpu"):
        check_devices("f", (CPU, META), {}, ("x",))
