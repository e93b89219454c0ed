"""Sampling state and results (the random numbers themselves are drawn by the core, from a counter-based generator)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from polyaccel.backend.placed import Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """``request_slots`` rows over a vocabulary of ``vocabulary`` ids; at most ``max_top_logprobs`` are returned a
    row."""

    request_slots: int
    vocabulary: int
    max_top_logprobs: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """What one request asks for; neutral values switch a filter off.

    ``bias_ids, bias_values`` are added to the logits; ``allowed`` (bool ``[vocabulary]``) masks all other ids;
    ``prompt_ids`` and ``output_ids`` seed the counts of the penalties (a preempted request returns with output).
    ``forbidden_until`` output tokens have been produced, ``forbidden_ids`` are masked (min_tokens).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = -1
    seed: int = 0
    bias_ids: np.ndarray | None = None
    bias_values: np.ndarray | None = None
    allowed: np.ndarray | None = None
    prompt_ids: np.ndarray | None = None
    output_ids: np.ndarray | None = None
    forbidden_ids: np.ndarray | None = None
    forbidden_until: int = 0

    @property
    def is_plain_greedy(self) -> bool:
        """Argmax of the raw logits answers this row: no filter, penalty, bias, mask or logprobs."""
        return self.temperature == 0.0 and self.keeps_logits and self.logprobs < 0

    @property
    def keeps_logits(self) -> bool:
        """Neither penalty, bias nor mask changes this row's logits."""
        return (
            self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and self.bias_ids is None
            and self.allowed is None
            and self.forbidden_ids is None
        )


class SamplingState(Placed, ABC):
    """Per-request state on the device: parameters, counts, masks and the last sampled token, by request slot."""

    spec: SamplingSpec

    @abstractmethod
    def write(self, slot: int, row: SamplingRow) -> None:
        """Begin a request in ``slot``; ordered with the operators of the device."""

    @abstractmethod
    def clear(self, slot: int) -> None:
        """End it."""

    @abstractmethod
    def last_tokens(self) -> torch.Tensor:
        """``[request_slots]`` int64 on the device: the token sampled last in each slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """Device tensors of R rows: ``ids`` int64 ``[R]``; and, when any row asked for them, ``logprobs`` float32 ``[R]``
    of the sampled ids and the ``top_ids`` int64, ``top_logprobs`` float32 ``[R, max_top_logprobs]`` (ties: lowest id
    first). Log-probabilities are of the logits after penalties, bias and mask, before temperature and filters."""

    ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
