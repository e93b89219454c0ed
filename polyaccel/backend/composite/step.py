"""A step whose metadata reaches the device array by array, when an operator first asks for it."""

from __future__ import annotations

import numpy as np
import torch

from polyaccel.backend.device import Device
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.step import DEVICE_ARRAYS, DeviceState, RowSet, Step, StepInput, plan_key


class TensorStep(Step):
    """Metadata as plain tensors. On the CPU they share memory with the step's arrays, which the step owns.

    Token sources are resolved when ``token_ids`` is first asked for, so that they see every sample issued before that.
    """

    def __init__(self, inputs: StepInput, state: DeviceState, device: Device) -> None:
        self.input = inputs
        self.state = state
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)
        self._device = device
        self.torch_device = device.torch_device
        self._on_host = device.torch_device.type == "cpu"
        self._tensors: dict[str, torch.Tensor] = {}
        self._adapters: dict[RowSet, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def tensor(self, name: str) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is None:
            if name not in DEVICE_ARRAYS:
                raise OperatorError("Step.tensor", f"no array {name!r}; a step has {', '.join(DEVICE_ARRAYS)}")
            found = self._token_ids() if name == "token_ids" else self._upload(getattr(self.input, name))
            self._tensors[name] = found
        return found

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self._adapters.get(row_set)
        if found is None:
            triples = self.input.rows(row_set)
            found = (
                self._upload(triples.rows.astype(np.int64)),
                self._upload(triples.slots.astype(np.int64)),
                self._upload(triples.weights),
            )
            self._adapters[row_set] = found
        return found

    def _token_ids(self) -> torch.Tensor:
        ids = self.input.token_ids
        sources = ids < 0
        if not sources.any():
            return self._upload(ids)
        sampling = self.state.sampling
        if sampling is None:
            raise OperatorError("Step.tensor", "token_ids name sampled tokens but the step has no sampling state")
        last = sampling.last_tokens()
        if sources.all():
            return last.index_select(0, self._upload(-1 - ids))
        sampled = last.index_select(0, self._upload(np.where(sources, -1 - ids, 0)))
        return torch.where(self._upload(sources), sampled, self._upload(ids))

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        if self._on_host:
            return torch.from_numpy(np.ascontiguousarray(array))
        return self._device.upload(array)
