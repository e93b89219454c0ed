"""A step that uploads everything when it begins."""

from __future__ import annotations

import numpy as np
import torch

from polyaccel.backend import Device, DeviceState, RowSet, Step, StepInput
from polyaccel.backend.step import DEVICE_ARRAYS, plan_key


class UploadedStep(Step):
    """Every array is on the device before the first operator runs."""

    def __init__(self, inputs: StepInput, state: DeviceState, device: Device) -> None:
        self.input, self.state = inputs, state
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)
        self._tensors = {name: device.upload(getattr(inputs, name)) for name in DEVICE_ARRAYS}
        self._triples = {name: self._upload(name, device) for name in inputs.adapters}
        sampled = inputs.token_ids < 0
        if state.sampling is not None and sampled.any():
            sources = device.upload(np.where(sampled, -1 - inputs.token_ids, 0))
            last = state.sampling.last_tokens().index_select(0, sources)
            self._tensors["token_ids"] = torch.where(device.upload(sampled), last, self._tensors["token_ids"])

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._triples[row_set]

    def _upload(self, row_set: RowSet, device: Device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        triples = self.input.rows(row_set)
        rows, slots = triples.rows.astype(np.int64), triples.slots.astype(np.int64)
        return device.upload(rows), device.upload(slots), device.upload(triples.weights)
