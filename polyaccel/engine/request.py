"""Requests and their sequences: one sequence for each of a request's choices."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from polyaccel.backend.sampling import SamplingRow
from polyaccel.engine.adapter_table import AdapterSlots
from polyaccel.engine.outputs import TokenLogprob
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.lora.mix import AdapterMix


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A prompt with its parameters, as the core keeps it.

    Attributes:
        prompt: int32 ``[P]``, never changed.
        serial: order of arrival; a request with n choices takes n serials.
        limit: tokens a sequence may reach, prompt included.
        stop_ids: every id that ends a sequence, int64.
        seed: of the random numbers, drawn by the engine where the caller gave none.
        open: sequences that have not been closed yet; at 0 the adapters are released.
    """

    id: str
    prompt: npt.NDArray[np.int32]
    params: SamplingParams
    mix: AdapterMix
    priority: int
    serial: int
    limit: int
    stop_ids: npt.NDArray[np.int64]
    seed: int
    watched: bool
    arrived: float
    open: int
    adapter_slots: AdapterSlots | None = None
    cache_key: Hashable = ()
    sequences: list[Sequence] = field(default_factory=list)


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One choice of a request.

    ``tokens`` (int32) is current only while the sequence has no request slot; a preempted one keeps its output there.
    """

    request: Request
    choice: int
    tokens: npt.NDArray[np.int32]
    slot: int = -1
    queued: bool = False
    finished: bool = False
    cached_tokens: int = 0
    admitted: float | None = None
    first_token: float | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        """Seniority: lower is served first and preempted last."""
        return self.request.priority, self.request.serial + self.choice


def sampling_row(sequence: Sequence, vocabulary: int) -> SamplingRow:
    """The sampling state with which a sequence enters, or returns to, a request slot."""
    request, params = sequence.request, sequence.request.params
    output = sequence.tokens[len(request.prompt) :]
    bias = params.logit_bias
    allowed: npt.NDArray[np.bool_] | None = None
    if params.allowed_token_ids is not None:
        allowed = np.zeros(vocabulary, dtype=np.bool_)
        allowed[list(params.allowed_token_ids)] = True
    forbids = params.min_tokens > 0 and len(request.stop_ids) > 0
    return SamplingRow(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        seed=request.seed,
        bias_ids=None if bias is None else np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
        bias_values=None if bias is None else np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
        allowed=allowed,
        prompt_ids=request.prompt.astype(np.int64) if params.has_penalties else None,
        output_ids=output.astype(np.int64) if len(output) > 0 else None,
        forbidden_ids=request.stop_ids if forbids else None,
        forbidden_until=params.min_tokens if forbids else 0,
    )
