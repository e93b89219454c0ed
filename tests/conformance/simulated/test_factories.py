"""Virtual devices under torch's numbers: machines do not mix, and what belongs to them lies with torch."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from polyaccel.backend.errors import ConfigurationError
from polyaccel_conformance.simulated import Runtime
from polyaccel_conformance.simulated.factories import DEVICE_TYPE, device_of, virtual_device


def test_machines_of_one_process_have_devices_of_their_own() -> None:
    first, second = Runtime(devices=2), Runtime(devices=3)
    numbers = [device.number for machine in (first, second) for device in machine.devices]
    assert len(set(numbers)) == 5
    for machine in (first, second):
        for device in machine.devices:
            assert device_of(device.torch_device) is device
            assert virtual_device(device.torch_device) is device
            assert torch.zeros(3, device=device.torch_device).device == device.torch_device


def test_the_numbers_of_a_machine_that_is_gone_mean_nothing() -> None:
    machine = Runtime(devices=2)
    where = machine.devices[1].torch_device
    del machine
    gc.collect()
    with pytest.raises(ConfigurationError, match="is no virtual device of this process"):
        device_of(where)
    assert virtual_device(where) is None


def test_no_other_device_is_a_virtual_one() -> None:
    assert virtual_device(torch.device("cpu")) is None
    assert virtual_device(torch.device("meta")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_numbers_reach_an_operator_that_chooses(dtype: torch.dtype) -> None:
    device = Runtime(devices=2).devices[1].torch_device
    host = torch.tensor([-1, 0, 2], dtype=dtype)
    found = torch.where(host.to(device) > 0, host.to(device), 7).to("cpu")
    assert torch.equal(found, torch.where(host > 0, host, 7))
    assert found.dtype == dtype


CLAIMED = """
import torch
torch.utils.rename_privateuse1_backend("vendor")
from polyaccel_conformance.simulated import SimulatedBackend
backend = SimulatedBackend()
device = backend.devices()[1]
x = device.upload(torch.arange(3.0))
device.synchronize()
print(device.download(x).wait().tolist(), [d.index for d in backend.devices()])
"""


def test_a_process_in_which_another_package_has_the_name_reaches_them_by_the_contract() -> None:
    done = subprocess.run([sys.executable, "-c", CLAIMED], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[0.0, 1.0, 2.0] [0, 1]\n", done.stderr
    assert DEVICE_TYPE == "privateuseone"
