"""A device that its driver does not describe, or not in full, neither stops a run nor is made up."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from polyaccel.backend import TorchDevice
from polyaccel_conformance.certificate.environment import driver
from polyaccel_conformance.multi.identity import device_id


class Silent:
    """Properties of which each read asks the driver, which does not answer."""

    @property
    def uuid(self) -> str:
        raise RuntimeError("aclGetDeviceCapability: 107002")

    def __str__(self) -> str:
        raise RuntimeError("aclGetDeviceCapability: 107002")


def _module(answer: object) -> SimpleNamespace:
    """torch's module of a device whose ``get_device_properties`` gives or raises ``answer``."""
    return SimpleNamespace(get_device_properties=mock.Mock(side_effect=[answer]))


UNUSED = RuntimeError("aclrtGetMemInfo: error code is 107002, no device is set")


@pytest.mark.parametrize("answer", [UNUSED, Silent()], ids=["unused", "silent"])
def test_the_driver_of_a_device_that_does_not_answer_is_unknown(answer: object) -> None:
    with mock.patch.object(torch, "get_device_module", return_value=_module(answer)):
        assert "cuda unknown" in driver(torch.device("cuda:0")).split(", ")


@pytest.mark.parametrize("answer", [UNUSED, Silent()], ids=["unused", "silent"])
def test_a_device_that_does_not_answer_is_told_apart_by_torchs_name(answer: object) -> None:
    with mock.patch.object(torch, "get_device_module", return_value=_module(answer)):
        assert device_id(TorchDevice("cuda:3")) == "cuda:3"


def test_what_a_driver_says_is_taken_as_it_is() -> None:
    described = SimpleNamespace(uuid="GPU-7")
    with mock.patch.object(torch, "get_device_module", return_value=_module(described)):
        assert device_id(TorchDevice("cuda:3")) == "cuda GPU-7"
    with mock.patch.object(torch, "get_device_module", return_value=_module("_Properties(name='A')")):
        said = driver(torch.device("cuda:0"))
    assert "_Properties(name='A')" in said
    assert "unknown" not in said


def test_only_the_drivers_own_error_is_taken_for_silence() -> None:
    with (
        mock.patch.object(torch, "get_device_module", return_value=_module(TypeError("a wrong argument"))),
        pytest.raises(TypeError),
    ):
        driver(torch.device("cuda:0"))
