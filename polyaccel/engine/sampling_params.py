"""What a request asks of the sampler, with OpenAI's names."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from polyaccel.backend.errors import RequestRejected

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_PENALTY = 2.0
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    Attributes:
        temperature: 0 is greedy (argmax, lowest id); otherwise logits are divided by it.
        top_p: keep the most likely ids whose probabilities reach this sum; 1 keeps all.
        top_k: keep this many most likely ids; 0 keeps all.
        min_p: keep ids at least this likely relative to the most likely one; 0 keeps all.
        max_tokens: output tokens at most; None goes on to the end of the context.
        min_tokens: output tokens before an end-of-sequence id or a stop id may be sampled.
        stop: strings that end the output; kept as a tuple.
        stop_token_ids: further ids that end the output; kept as a tuple.
        seed: of this request's random numbers; None lets the engine draw one.
        n: choices, each sampled on its own from the same prompt.
        logprobs: None for none, else the number (0 to 20) of most likely ids reported beside each sampled one.
        presence_penalty: subtracted from the logit of every id in the output, -2 to 2.
        frequency_penalty: subtracted once for each occurrence in the output, -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of ids in prompt and output; 1 is off.
        ignore_eos: go on past end-of-sequence ids (``stop_token_ids`` still end the output).
        logit_bias: id to value in -100 to 100, added to the logits.
        allowed_token_ids: when given, no other id is ever sampled; kept as a tuple.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestRejected: a value of a wrong type or out of range; the message names the field and the value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._set_number("temperature", 0.0, math.inf)
        self._set_number("top_p", 0.0, 1.0, above_low=True)
        self._check_int("top_k", 0)
        self._set_number("min_p", 0.0, 1.0)
        self._check_int("max_tokens", 1, optional=True)
        self._check_int("min_tokens", 0)
        self._check_int("seed", 0, 2**64 - 1, optional=True)
        self._check_int("n", 1, MAX_CHOICES)
        self._check_int("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._set_number("presence_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._set_number("frequency_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._set_number("repetition_penalty", 0.0, math.inf, above_low=True)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _rejected(name, getattr(self, name), "True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _rejected("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids) or ())
        object.__setattr__(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _rejected("allowed_token_ids", (), "at least one id, or None")
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as the tuple it was normalised to."""
        return _strings(self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """``stop_token_ids`` as the tuple they were normalised to."""
        return tuple(self.stop_token_ids or ())

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _check_int(self, name: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        accepted = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise _rejected(name, value, accepted + (" or None" if optional else ""))

    def _set_number(self, name: str, low: float, high: float, *, above_low: bool = False) -> None:
        value = getattr(self, name)
        start = f"above {low:g}" if above_low else f"of at least {low:g}"
        accepted = f"a finite number {start}" + ("" if math.isinf(high) else f" and at most {high:g}")
        number = _finite(value)
        if number is None or number < low or number > high or (above_low and number == low):
            raise _rejected(name, value, accepted)
        object.__setattr__(self, name, number)


def _rejected(name: str, value: object, accepted: str) -> RequestRejected:
    return RequestRejected(f"{name}={value!r:.200} cannot be used: it must be {accepted}")


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(text, str) and text for text in value):
        raise _rejected("stop", value, "a non-empty string, a sequence of them, or None")
    return tuple(value)


def _ids(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise _rejected(name, value, "a collection of token ids or None")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise _rejected(name, token, "token ids, which are integers of at least 0")
    return tuple(value)


def _bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _rejected("logit_bias", value, "a mapping of token ids to numbers, or None")
    bias: dict[int, float] = {}
    for token, number in value.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise _rejected("logit_bias", token, "keyed by token ids, which are integers of at least 0")
        finite = _finite(number)
        if finite is None or abs(finite) > MAX_BIAS:
            raise _rejected("logit_bias", number, f"a mapping to numbers in -{MAX_BIAS:g}..{MAX_BIAS:g}")
        bias[token] = finite
    return bias or None
