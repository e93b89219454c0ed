"""Sampling state as plain tensors: one row for each request slot; the wide tables exist once a request needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from polyaccel.backend.device import Device
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.sampling import SamplingRow, SamplingSpec, SamplingState

PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Columns of the parameter table, float32."""


class StepNeeds(NamedTuple):
    """What the rows of one step, or one row, ask for; found on the host from the requests' own rows."""

    sampling: bool
    ordering: bool
    min_p: bool
    penalties: bool
    bias: bool
    mask: bool
    logprobs: bool

    @classmethod
    def of(cls, row: SamplingRow) -> StepNeeds:
        random = row.temperature != 0.0
        return cls(
            sampling=random,
            ordering=random and (row.top_k > 0 or row.top_p < 1.0),
            min_p=random and row.min_p > 0.0,
            penalties=row.repetition_penalty != 1.0 or row.presence_penalty != 0.0 or row.frequency_penalty != 0.0,
            bias=row.bias_ids is not None,
            mask=row.allowed is not None or row.forbidden_ids is not None,
            logprobs=row.logprobs >= 0,
        )


class TensorSamplingState(SamplingState):
    """Storage for any torch device.

    Attributes:
        parameters: ``[request_slots, len(PARAMETERS)]`` float32.
        output_counts: ``[request_slots, vocabulary]`` int32, None until a request has a penalty; likewise
        prompt_mask: bool, ids in the prompt; bias: float32; allowed: bool.
    """

    def __init__(self, spec: SamplingSpec, device: Device) -> None:
        self.spec = spec
        self.output_counts: torch.Tensor | None = None
        self.prompt_mask: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.allowed: torch.Tensor | None = None
        self._device = device
        self.torch_device = device.torch_device
        # By slot and field of StepNeeds; on the host, so that a step's needs are one lookup.
        self._flags = np.zeros((spec.request_slots, len(StepNeeds._fields)), dtype=bool)
        self._limited: dict[int, _Limit] = {}
        with device.scope():
            self.parameters = device.zeros((spec.request_slots, len(PARAMETERS)), torch.float32)
            self._last = device.zeros((spec.request_slots,), torch.int64)

    def write(self, slot: int, row: SamplingRow) -> None:
        """Begin a request in ``slot``.

        Raises:
            OperatorError: no such slot, or an id or a mask that does not fit the vocabulary; the slot is left empty.
        """
        self.clear(slot)
        self._check_ids(slot, row)
        needs = StepNeeds.of(row)
        with self._device.scope():
            self.parameters[slot].copy_(torch.tensor([float(getattr(row, name)) for name in PARAMETERS]))
            if needs.penalties:
                self._seed_counts(slot, row)
            self._write_bias(slot, row)
            self._write_allowed(slot, row)
        self._flags[slot] = needs

    def clear(self, slot: int) -> None:
        self._check_slot(slot)
        self._flags[slot] = False
        self._limited.pop(slot, None)

    def last_tokens(self) -> torch.Tensor:
        return self._last

    # -- for sample --------------------------------------------------------------------------------------------------

    def needs(self, slots: np.ndarray) -> StepNeeds:
        """What the requests in ``slots`` (host array) need together; an empty slot is plain greedy."""
        return StepNeeds(*self._flags[slots].any(axis=0).tolist())

    def advance(self, slots: np.ndarray, rows: torch.Tensor, ids: torch.Tensor, needs: StepNeeds) -> None:
        """Record the sampled ``ids: [R]`` int64 of the request slots ``rows: [R]`` int64 (device), ``slots`` (host)."""
        self._last.index_copy_(0, rows, ids)
        if self.output_counts is not None and needs.penalties:
            flat = self.output_counts.view(-1)
            flat.index_add_(0, rows * self.spec.vocabulary + ids, torch.ones_like(ids, dtype=torch.int32))
        if self._limited:
            for slot in slots.tolist():
                self._count_output(slot)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _seed_counts(self, slot: int, row: SamplingRow) -> None:
        shape = (self.spec.request_slots, self.spec.vocabulary)
        if self.output_counts is None or self.prompt_mask is None:
            self.output_counts = self._device.zeros(shape, torch.int32)
            self.prompt_mask = self._device.zeros(shape, torch.bool)
        counts = np.bincount(_ids(row.output_ids), minlength=self.spec.vocabulary)
        self.output_counts[slot].copy_(torch.from_numpy(counts.astype(np.int32)))
        mask = np.zeros(self.spec.vocabulary, dtype=bool)
        mask[_ids(row.prompt_ids)] = True
        self.prompt_mask[slot].copy_(torch.from_numpy(mask))

    def _write_bias(self, slot: int, row: SamplingRow) -> None:
        if row.bias_ids is None or row.bias_values is None:
            if self.bias is not None:
                self.bias[slot].zero_()
            return
        if self.bias is None:
            self.bias = self._device.zeros((self.spec.request_slots, self.spec.vocabulary), torch.float32)
        values = np.zeros(self.spec.vocabulary, dtype=np.float32)
        np.add.at(values, _ids(row.bias_ids), row.bias_values.astype(np.float32))
        self.bias[slot].copy_(torch.from_numpy(values))

    def _write_allowed(self, slot: int, row: SamplingRow) -> None:
        produced = 0 if row.output_ids is None else len(row.output_ids)
        forbidden = None if row.forbidden_ids is None or produced >= row.forbidden_until else _ids(row.forbidden_ids)
        if row.allowed is None and forbidden is None:
            if self.allowed is not None:
                self.allowed[slot].fill_(True)
            return
        if self.allowed is None:
            self.allowed = self._device.zeros((self.spec.request_slots, self.spec.vocabulary), torch.bool)
            self.allowed.fill_(True)
        allowed = np.ones(self.spec.vocabulary, dtype=bool) if row.allowed is None else row.allowed.astype(bool)
        if forbidden is None:
            self.allowed[slot].copy_(torch.from_numpy(allowed))
            return
        device = self._device
        after = device.upload(allowed)
        self._limited[slot] = _Limit(left=row.forbidden_until - produced, after=after)
        during = allowed.copy()
        during[forbidden] = False
        self.allowed[slot].copy_(torch.from_numpy(during))

    def _count_output(self, slot: int) -> None:
        limit = self._limited.get(slot)
        if limit is None:
            return
        limit.left -= 1
        if limit.left <= 0:
            del self._limited[slot]
            if self.allowed is not None:
                self.allowed[slot].copy_(limit.after)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.spec.request_slots:
            raise OperatorError("SamplingState.write", f"request slot {slot} of {self.spec.request_slots}")

    def _check_ids(self, slot: int, row: SamplingRow) -> None:
        vocabulary = self.spec.vocabulary
        for name in ("bias_ids", "prompt_ids", "output_ids", "forbidden_ids"):
            ids = _ids(getattr(row, name))
            if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
                raise OperatorError(
                    "SamplingState.write",
                    f"slot {slot}: {name} {ids.min()}..{ids.max()} outside a vocabulary of {vocabulary}",
                )
        if (row.bias_ids is None) != (row.bias_values is None) or len(_ids(row.bias_ids)) != len(_ids(row.bias_values)):
            raise OperatorError("SamplingState.write", f"slot {slot}: bias_ids and bias_values differ in length")
        if row.allowed is not None and row.allowed.shape != (vocabulary,):
            raise OperatorError(
                "SamplingState.write", f"slot {slot}: allowed has shape {row.allowed.shape}, expected ({vocabulary},)"
            )
        if row.logprobs > self.spec.max_top_logprobs:
            raise OperatorError(
                "SamplingState.write", f"slot {slot}: {row.logprobs} logprobs of {self.spec.max_top_logprobs}"
            )


@dataclass(slots=True)
class _Limit:
    """``left`` outputs until ``after`` (bool ``[vocabulary]`` on the device) is the request's mask."""

    left: int
    after: torch.Tensor


def _ids(values: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, dtype=np.int64) if values is None else np.asarray(values, dtype=np.int64)
