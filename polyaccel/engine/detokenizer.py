"""Text from tokens as they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyaccel.engine.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns one request's tokens into text piece by piece.

    The pieces that ``push`` returns, and what ``finish`` returns, are together exactly ``tokenizer.decode`` of all
    tokens, however the tokens were cut into pushes. Text is handed out as soon as no later token can change it. A push
    costs time in proportion to its own tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._pieces: _ByteLevelPieces | _ContextPieces
        if tokenizer.is_byte_level:
            self._pieces = _ByteLevelPieces(tokenizer, skip_special_tokens)
        else:
            self._pieces = _ContextPieces(tokenizer, skip_special_tokens)

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the text that has become final, possibly none."""
        return self._pieces.push(ids)

    def finish(self) -> str:
        """The remaining text, with U+FFFD for bytes that form no character. Call once, after the last push."""
        return self._pieces.finish()


class _ByteLevelPieces:
    """Every token stands for bytes, so an incremental UTF-8 decoder is all it takes."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        tokenizer, skip = self._tokenizer, self._skip
        return self._decoder.decode(
            b"".join(tokenizer.token_bytes(token) for token in ids if not (skip and tokenizer.is_special(token)))
        )

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ContextPieces:
    """Decoders that look at neighbours: a space before the first token is dropped, byte tokens are joined in runs.

    A run of byte tokens becomes text only as a whole (one bad byte turns all of it into U+FFFD), so it is held until
    another token ends it. The last token that is not a byte serves as context, so that the next text is not taken for
    the beginning.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_length = 0
        self._waiting: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        complete = 0
        for token in ids:
            text = self._tokenizer.token(token)
            if not text or (self._skip and self._tokenizer.is_special(token)):
                continue
            self._waiting.append(token)
            if not self._tokenizer.is_byte_token(token):
                complete = len(self._waiting)
        if not complete:
            return ""
        text = self._decode(complete)
        self._context = [self._waiting[complete - 1]]
        self._context_length = len(self._tokenizer.decode(self._context, skip_special_tokens=False))
        self._waiting = self._waiting[complete:]
        return text

    def finish(self) -> str:
        text = self._decode(len(self._waiting))
        self._waiting = []
        return text

    def _decode(self, count: int) -> str:
        window = self._context + self._waiting[:count]
        return self._tokenizer.decode(window, skip_special_tokens=False)[self._context_length :]
