"""The guarded launch: one device for all operands, its scope entered and left again, the ledger written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from polyaccel.backend import Launcher, Ledger, OperatorError

CPU, META = torch.zeros(2), torch.zeros(3, device="meta")


class Scopes:
    """A current device, as a driver would keep it."""

    def __init__(self, current: str) -> None:
        self.current = torch.device(current)
        self.log: list[str] = []

    @contextmanager
    def enter(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        self.log.append(f"enter {device}")
        try:
            yield
        finally:
            self.current = before
            self.log.append(f"back to {before}")

    def launcher(self, ledger: Ledger | None = None) -> Launcher:
        return Launcher(ledger or Ledger(), enter=self.enter, is_current=lambda device: device == self.current)


def test_a_launch_runs_in_the_operands_device_and_returns_the_result() -> None:
    scopes = Scopes("cpu")
    seen: list[torch.device] = []

    def kernel(x: torch.Tensor, *, twice: bool) -> str:
        seen.append(scopes.current)
        return f"{x.device} {twice}"

    assert scopes.launcher().launch("k", (META,), kernel, META, twice=True) == "meta True"
    assert seen == [torch.device("meta")]
    assert scopes.current == torch.device("cpu")


def test_a_device_that_is_current_is_not_entered() -> None:
    scopes = Scopes("cpu")
    scopes.launcher().launch("k", (CPU, None), lambda: None)
    assert scopes.log == []


def test_the_scope_is_left_when_the_kernel_raises() -> None:
    scopes = Scopes("cpu")

    def broken() -> None:
        raise RuntimeError("illegal address")

    with pytest.raises(RuntimeError, match="illegal address"):
        scopes.launcher().launch("k", (META,), broken)
    assert scopes.log == ["enter meta", "back to cpu"]
    assert scopes.current == torch.device("cpu")


def test_operands_on_two_devices_are_refused_naming_each_before_anything_runs() -> None:
    ledger = Ledger()
    launcher = Launcher(ledger, rank=2)
    ran: list[int] = []
    with pytest.raises(OperatorError) as caught:
        launcher.launch("sgmv", (CPU, None, META), ran.append, 1)
    text = str(caught.value)
    assert "operator 'sgmv' on rank 2: operand 2 is on meta but operand 0 is on cpu" in text
    assert "operand 0: float32[2] stride [1] on cpu" in text
    assert "operand 2: float32[3] stride [1] on meta" in text
    assert ran == []
    assert ledger.counts() == {}


def test_the_operand_that_the_others_are_compared_with_is_named_by_its_own_index() -> None:
    with pytest.raises(OperatorError, match="operand 3 is on meta but operand 1 is on cpu"):
        Launcher(Ledger()).common_device("k", (None, CPU, CPU, META))


def test_operands_given_by_name_are_named_in_the_error() -> None:
    launcher = Launcher(Ledger())
    assert launcher.launch("k", {"x": CPU, "bias": None}, lambda: 3) == 3
    with pytest.raises(OperatorError, match="residual is on meta but x is on cpu") as caught:
        launcher.launch("k", {"x": CPU, "bias": None, "residual": META}, lambda: 3)
    assert [operand.name for operand in caught.value.operands] == ["x", "residual"]


def test_a_launch_without_operands_is_refused() -> None:
    with pytest.raises(OperatorError, match="without a tensor operand"):
        Launcher(Ledger()).launch("k", (None,), lambda: None)


def test_every_launch_is_counted_under_its_kernel() -> None:
    ledger = Ledger()
    launcher = Launcher(ledger)
    for kernel in ("a", "b", "a"):
        launcher.launch(kernel, (CPU,), lambda: None)
    assert ledger.counts() == {"a": 2, "b": 1}
