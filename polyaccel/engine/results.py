"""Events of single sequences from what a step returned."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel.engine.events import FinishEvent, TokenEvent
from polyaccel.engine.messages import StepResult
from polyaccel.engine.outputs import FinishReason, Timing, TokenLogprob
from polyaccel.engine.request import Sequence


def token_event(sequence: Sequence, token_id: int, result: StepResult, row: int) -> TokenEvent:
    """The event of a new token; its log-probabilities are kept in the sequence where they were asked for."""
    request = sequence.request
    logprob: TokenLogprob | None = None
    if request.params.logprobs is not None and result.logprobs is not None:
        logprob = TokenLogprob(
            token_id=token_id,
            logprob=float(result.logprobs[row]),
            top=_top(result, row, request.params.logprobs),
        )
        sequence.logprobs.append(logprob)
    return TokenEvent(request.id, sequence.choice, token_id, logprob)


def finish_event(
    sequence: Sequence,
    output: npt.NDArray[np.int32],
    reason: FinishReason,
    stop_reason: int | str | None,
    error: Exception | None,
    now: float,
) -> FinishEvent:
    """The event of a sequence's end at time ``now``; ``output`` is copied."""
    request = sequence.request
    return FinishEvent(
        request_id=request.id,
        choice=sequence.choice,
        reason=reason,
        stop_reason=stop_reason,
        token_ids=output.astype(np.int64),
        logprobs=None if request.params.logprobs is None else tuple(sequence.logprobs),
        prompt_tokens=len(request.prompt),
        cached_tokens=sequence.cached_tokens,
        adapter=request.mix,
        timing=_timing(sequence, now),
        error=error,
    )


def _top(result: StepResult, row: int, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0 or result.top_ids is None or result.top_logprobs is None:
        return ()
    ids, values = result.top_ids[row, :count].tolist(), result.top_logprobs[row, :count].tolist()
    return tuple(zip(ids, values, strict=True))


def _timing(sequence: Sequence, now: float) -> Timing:
    arrived = sequence.request.arrived
    if sequence.admitted is None:
        return Timing(queue=now - arrived, prefill=0.0, first_token=0.0, decode=0.0)
    queue = sequence.admitted - arrived
    if sequence.first_token is None:
        return Timing(queue=queue, prefill=now - sequence.admitted, first_token=0.0, decode=0.0)
    return Timing(
        queue=queue,
        prefill=sequence.first_token - sequence.admitted,
        first_token=sequence.first_token - arrived,
        decode=now - sequence.first_token,
    )
