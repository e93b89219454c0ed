"""A backend from a table of callables: first operators, planted bugs, other projects' kernels, without a
distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polyaccel.backend import stations
from polyaccel.backend.backend import Availability, Backend, Implementations
from polyaccel.backend.device import Device, TorchDevice
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.step import DEVICE_ARRAYS, DeviceState, Step, StepInput
from polyaccel.backend.vocabulary import OPERATORS


class TableBackend(Backend):
    """``TableBackend("cuda", {"rms_norm": my_rms_norm})``: the given operators natively, the rest as composites.

    ``linear`` and ``dequantize`` default to plain torch on the device.

    Args:
        device: a torch device or its name, or a Device.
        operators: callables or entries by operator or station name.
        name: shown in plans and reports.

    Raises:
        ConfigurationError: a name is not in the contract's vocabulary.
    """

    priority = None
    isolate = False

    def __init__(
        self, device: str | torch.device | Device, operators: Mapping[str, Implementations], *, name: str = "table"
    ) -> None:
        super().__init__()
        unknown = sorted(set(operators) - set(OPERATORS) - set(stations.STATIONS))
        if unknown:
            raise ConfigurationError(
                f"unknown operators {unknown}; the contract has {sorted([*OPERATORS, *stations.STATIONS])}"
            )
        self.name = name
        self._device = device if isinstance(device, Device) else TorchDevice(device)
        self._operators = dict(operators)
        self.fork_safe = self._device.torch_device.type == "cpu"

    @property
    def given(self) -> tuple[str, ...]:
        """Operators and stations that the table holds; the rest are composites."""
        return tuple(self._operators)

    def probe(self) -> Availability:
        try:
            self._device.empty((1,), torch.float32)
        except Exception as error:
            return Availability(usable=False, reason=f"{self._device.name} does not allocate: {error}")
        return Availability(usable=True, devices=(self._device.name,), hardware=True)

    def devices(self) -> Sequence[Device]:
        return (self._device,)

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        """As any backend's, but with the arrays on the device at once: a table's kernels copy nothing to it."""
        step = super().begin_step(inputs, state, device)
        if self._device.torch_device.type != "cpu":
            for name in DEVICE_ARRAYS:
                # Which tokens were sampled is known only when the ids are asked for.
                if name != "token_ids":
                    step.tensor(name)
            for row_set in inputs.adapters:
                step.adapter_tensors(row_set)
        return step

    def operators(self) -> Mapping[str, Implementations]:
        from polyaccel.backend.composite.linear import dequantize, linear

        return {"linear": linear, "dequantize": dequantize, **self._operators}
