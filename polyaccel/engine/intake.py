"""From what a caller asks to a request that is certain to fit."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from polyaccel.backend.errors import RequestRejected, RequestTooLong
from polyaccel.engine.request import Request, Sequence
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.lora.mix import AdapterMix

PromptIds = Items[int] | npt.NDArray[np.integer]


class Intake:
    """Checks requests against vocabulary and capacity, and gives out seeds and places in the order of arrival.

    ``max_tokens`` is the longest sequence that can be served, prompt included.
    """

    def __init__(self, *, vocabulary: int, max_tokens: int, eos_token_ids: Items[int], seed: int) -> None:
        self.max_tokens = max_tokens
        self._vocabulary = vocabulary
        self._eos = tuple(dict.fromkeys(eos_token_ids))
        self._seeds = np.random.default_rng(seed)
        self._serial = 0

    def request(
        self,
        request_id: str,
        prompt_ids: PromptIds,
        params: SamplingParams,
        mix: AdapterMix,
        *,
        priority: int,
        watched: bool,
        now: float,
    ) -> Request:
        """A request with a sequence for each of its choices.

        Raises:
            RequestRejected: an empty prompt, an id outside the vocabulary, a priority that is no integer.
            RequestTooLong: prompt and max_tokens exceed what one sequence may hold.
        """
        prompt = self._prompt(prompt_ids)
        limit = self._limit(len(prompt), params)
        self._check_ids("stop_token_ids", params.stop_ids)
        self._check_ids("logit_bias", tuple(params.logit_bias or ()))
        self._check_ids("allowed_token_ids", tuple(params.allowed_token_ids or ()))
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**31:
            raise RequestRejected(f"priority={priority!r:.200} cannot be used: it must be a 32-bit integer")
        stop_ids = (() if params.ignore_eos else self._eos) + params.stop_ids
        request = Request(
            id=request_id,
            prompt=prompt,
            params=params,
            mix=mix,
            priority=priority,
            serial=self._serial,
            limit=limit,
            stop_ids=np.array(tuple(dict.fromkeys(stop_ids)), dtype=np.int64),
            seed=int(self._seeds.integers(2**64, dtype=np.uint64)) if params.seed is None else params.seed,
            watched=watched,
            arrived=now,
            open=params.n,
        )
        request.sequences = [Sequence(request=request, choice=choice, tokens=prompt) for choice in range(params.n)]
        self._serial += params.n
        return request

    def stop_reason(self, request: Request, token_id: int) -> int | None:
        """What ended a request that sampled one of its stop ids: None for an end-of-sequence id."""
        return None if token_id in self._eos and not request.params.ignore_eos else token_id

    def _prompt(self, prompt_ids: PromptIds) -> npt.NDArray[np.int32]:
        try:
            prompt = np.asarray(prompt_ids)
        except ValueError as error:
            raise RequestRejected(f"the prompt must be a flat sequence of token ids: {error}") from None
        if prompt.size == 0:
            raise RequestRejected("the prompt is empty: give at least one token")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise RequestRejected(f"the prompt must be a flat sequence of token ids, not {prompt.dtype} {prompt.shape}")
        if prompt.min() < 0 or prompt.max() >= self._vocabulary:
            bad = int(prompt[(prompt < 0) | (prompt >= self._vocabulary)][0])
            raise RequestRejected(f"prompt id {bad} is outside the vocabulary 0..{self._vocabulary - 1}")
        return prompt.astype(np.int32)

    def _limit(self, prompt: int, params: SamplingParams) -> int:
        wanted = prompt + (1 if params.max_tokens is None else params.max_tokens)
        if wanted > self.max_tokens:
            asked = "at least one new token" if params.max_tokens is None else f"max_tokens={params.max_tokens}"
            raise RequestTooLong(
                f"a prompt of {prompt} tokens and {asked} make {wanted}, and a sequence may hold {self.max_tokens}; "
                "shorten the prompt, lower max_tokens, or raise max_model_len or the memory for KV blocks"
            )
        return self.max_tokens if params.max_tokens is None else wanted

    def _check_ids(self, name: str, ids: tuple[int, ...]) -> None:
        wrong = [token for token in ids if token >= self._vocabulary]
        if wrong:
            raise RequestRejected(f"{name} has id {wrong[0]}, outside the vocabulary 0..{self._vocabulary - 1}")
