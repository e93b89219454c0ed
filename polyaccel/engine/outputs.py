"""What a caller gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyaccel.lora.mix import AdapterMix

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds on the engine's clock.

    Attributes:
        queue: from arrival to the first step that was given this sequence.
        prefill: from there to the first output token.
        first_token: from arrival to the first output token (queue + prefill).
        decode: from the first output token to the end.

    A phase that was never reached is 0; one that was cut short lasts to the end.
    """

    queue: float
    prefill: float
    first_token: float
    decode: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A sampled token's log-probability, and those of the most likely ids at its place, best first.

    They are of the logits after penalties, bias and mask, before temperature and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished choice.

    A request with ``n`` choices gives n completions, side by side in the order of ``index``.

    Attributes:
        text: without prompt; without the stop string unless it was asked for.
        token_ids: sampled ids, an end-of-sequence id that ended the output included.
        finish_reason: ``stop`` (end-of-sequence id, stop id or stop string), ``length``, ``abort`` or ``error``.
        stop_reason: the stop id or stop string that ended it; None for an end-of-sequence id.
        logprobs: one entry a token where asked for, else None.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them came from the prefix cache.
        adapter: ``(name, weight)`` entries, empty for the base model.
        index: which of the request's choices this is.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_tokens: int
    cached_tokens: int
    adapter: AdapterMix
    timing: Timing
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What streaming adds since the last one of the same choice.

    ``text`` may be empty while it is held back (incomplete characters, a possible stop string). The last delta of a
    choice carries ``completion``.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    index: int = 0
    completion: Completion | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.completion is None else self.completion.finish_reason
