"""What a step of the engine core tells its owner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from polyaccel.engine.outputs import FinishReason, Timing, TokenLogprob
from polyaccel.lora.mix import AdapterMix


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A new token of a sequence whose request is watched (it streams, or has stop strings)."""

    request_id: str
    choice: int
    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishEvent:
    """A sequence has ended. It comes exactly once for each choice, after the last of its token events.

    ``token_ids`` are all of its output tokens, int64. ``error`` is set where ``reason`` is ``error``.
    """

    request_id: str
    choice: int
    reason: FinishReason
    stop_reason: int | str | None
    token_ids: npt.NDArray[np.int64]
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_tokens: int
    cached_tokens: int
    adapter: AdapterMix
    timing: Timing
    error: Exception | None = None


@dataclass(slots=True)
class StepEvents:
    """What one call of ``EngineCore.step`` submitted and learned.

    ``slots`` and ``ids`` (K new tokens; request slot and id) cover every sequence, watched or not; a slot may be
    reassigned by the next call. ``tokens`` has the watched sequences only, in row order.
    """

    slots: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tokens: list[TokenEvent] = field(default_factory=list)
    finished: list[FinishEvent] = field(default_factory=list)
    submitted: bool = False
    collected: bool = False

    @property
    def idle(self) -> bool:
        """Nothing moved: no work, or all of it waits for adapters. The owner may sleep before it calls again."""
        return not (self.submitted or self.collected or self.finished)
