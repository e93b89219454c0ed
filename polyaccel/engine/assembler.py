"""From sampled ids to text, on the caller's side: incremental decoding, stop strings and the final completion.

Runs in the thread of whoever asked, so that decoding text never delays a step.
"""

from __future__ import annotations

from polyaccel.engine.detokenizer import IncrementalDetokenizer
from polyaccel.engine.events import FinishEvent, TokenEvent
from polyaccel.engine.outputs import Completion, Delta, TokenLogprob
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.engine.stop_strings import StopStrings
from polyaccel.engine.tokenizer import Tokenizer


class ChoiceAssembler:
    """Builds one choice's deltas and completion.

    Without a tokenizer every text is empty. With ``watched`` it is pushed every token; otherwise it decodes once, at
    the end. After a stop string has matched (``matched``) later tokens are dropped: they were sampled before the
    engine learned of the match.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, index: int, *, watched: bool) -> None:
        self._tokenizer, self._params, self._index = tokenizer, params, index
        self._watched = watched
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include_stop=params.include_stop_str_in_output) if params.stop else None
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self.matched: str | None = None

    def push(self, event: TokenEvent) -> Delta | None:
        """The new text of one token; None once a stop string has matched."""
        if self.matched is not None:
            return None
        self._ids.append(event.token_id)
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        text = "" if self._detokenizer is None else self._emit(self._detokenizer.push([event.token_id]))
        logprobs = None if event.logprob is None else (event.logprob,)
        return Delta(text=text, token_ids=(event.token_id,), logprobs=logprobs, index=self._index)

    def finish(self, event: FinishEvent) -> tuple[str, Completion]:
        """The text not yet given out, and the whole completion."""
        if not self._watched:
            return self._finish_unwatched(event)
        tail = ""
        if self.matched is None and self._detokenizer is not None:
            tail = self._emit(self._detokenizer.finish())
        if self.matched is None and self._stops is not None:
            rest = self._stops.finish()
            self._text.append(rest)
            tail += rest
        matched = self.matched is not None
        token_ids = tuple(self._ids) if matched else tuple(event.token_ids.tolist())
        logprobs = tuple(self._logprobs) if matched and event.logprobs is not None else event.logprobs
        return tail, self._completion(event, "".join(self._text), token_ids, logprobs)

    def _finish_unwatched(self, event: FinishEvent) -> tuple[str, Completion]:
        ids = event.token_ids.tolist()
        text = ""
        if self._tokenizer is not None:
            text = self._tokenizer.decode(ids, skip_special_tokens=self._params.skip_special_tokens)
        return text, self._completion(event, text, tuple(ids), event.logprobs)

    def _emit(self, text: str) -> str:
        if self._stops is not None:
            text, self.matched = self._stops.push(text)
        self._text.append(text)
        return text

    def _completion(
        self, event: FinishEvent, text: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None
    ) -> Completion:
        return Completion(
            text=text,
            token_ids=token_ids,
            finish_reason="stop" if self.matched is not None else event.reason,
            stop_reason=self.matched if self.matched is not None else event.stop_reason,
            logprobs=logprobs,
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            adapter=event.adapter,
            timing=event.timing,
            index=self._index,
        )
