"""The watch tells computing from arranging, and sees copies, waiting and writes to operands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyaccel_conformance.harness.evidence import Activity, Watch, undeclared
from polyaccel_conformance.harness.kernels import has_profiler, undeclared_kernels
from polyaccel_conformance.harness.memory import Poison


def _watched(call: Callable[[torch.Tensor], object], poison: Poison = Poison.NAN) -> Activity:
    x = torch.arange(12.0).reshape(3, 4)
    watch = Watch(poison, {x.untyped_storage().data_ptr(): "x"})
    with watch:
        call(x)
    return watch.activity()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.view(4, 3).t()[1:].unsqueeze(0).expand(2, -1, -1),
        lambda x: torch.empty(3),
        lambda x: torch.zeros(3).fill_(1),
        lambda x: x.double(),
        lambda x: x.t().contiguous(),
    ],
)
def test_views_allocation_filling_casts_and_copies_are_no_computing(call: Callable[[torch.Tensor], object]) -> None:
    assert _watched(call).operators == {}


def test_computing_is_named_with_and_without_the_overload() -> None:
    activity = _watched(lambda x: torch.mm(x, x.t()).add_(1))
    assert dict(activity.operators) == {"aten::mm": 1, "aten::add_": 1}
    assert undeclared(activity, ("aten::mm", "aten::add_")) == []
    assert undeclared(activity, ("aten::mm.default", "aten::add_.Tensor")) == []
    assert undeclared(activity, ("aten::mm.out",)) == ["aten::add_", "aten::mm"]


def test_views_alone_are_no_activity() -> None:
    assert _watched(lambda x: x.view(-1)).dispatched == 0
    assert _watched(lambda x: torch.empty_like(x)).dispatched == 1


def test_copies_of_an_operand_are_counted_by_its_name() -> None:
    activity = _watched(
        lambda x: (x.t().contiguous(), x[:1].clone(), torch.empty(3, 4).copy_(x), torch.ones(2).clone())
    )
    assert dict(activity.operand_copies) == {"x": 3}
    assert dict(activity.conversions) == {}


def test_copies_to_another_dtype_are_told_from_those_to_another_layout() -> None:
    activity = _watched(lambda x: (x.double(), x.t().contiguous(), torch.empty(3, 4, dtype=torch.half).copy_(x)))
    assert dict(activity.operand_copies) == {"x": 3}
    assert dict(activity.conversions) == {"x": 2}


@pytest.mark.parametrize("call", [lambda x: x.mul_(2), lambda x: x[1:].zero_(), lambda x: torch.add(x, 1, out=x)])
def test_writes_to_an_operand_are_seen_even_if_its_bits_come_back(call: Callable[[torch.Tensor], object]) -> None:
    assert list(_watched(call).operand_writes) == ["x"]


def test_reading_an_operand_is_no_write() -> None:
    assert dict(_watched(lambda x: torch.empty(3, 4).add_(x)).operand_writes) == {}


@pytest.mark.parametrize("call", [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x.nonzero()])
def test_waiting_for_a_value_is_seen(call: Callable[[torch.Tensor], object]) -> None:
    assert _watched(call).reads


def test_a_copy_to_another_device_is_a_crossing() -> None:
    assert _watched(lambda x: x.to("meta")).crossings == ("aten::_to_copy cpu -> meta",)
    assert _watched(lambda x: x.to(torch.float16)).crossings == ()


def test_what_runs_after_the_call_has_returned_may_wait() -> None:
    x = torch.ones(2)
    with Watch(Poison.ZERO, {}) as watch:
        watch.returned()
        x.sum().item()
        x.to("meta")
    assert (watch.activity().reads, watch.activity().crossings) == ((), ())
    assert dict(watch.activity().operators) == {"aten::sum": 1}


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(5),
        lambda x: torch.empty_like(x),
        lambda x: x.new_empty(2, 2),
        lambda x: torch.empty_strided((2, 2), (4, 1)),
    ],
)
def test_every_kind_of_new_memory_is_poisoned(allocate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found: list[torch.Tensor] = []
    _watched(lambda x: found.append(allocate(x)))
    assert found[0].isnan().all()


def test_kernel_names_match_by_pattern() -> None:
    kernels = ("sgmv_shrink_kernel_16", "ampere_gemm", "vectorized_elementwise")
    assert undeclared_kernels(kernels, ("sgmv_*", "aten::mm", "*_gemm")) == ["vectorized_elementwise"]


def test_the_cpu_has_no_kernels_to_profile() -> None:
    assert not has_profiler(torch.device("cpu"))
