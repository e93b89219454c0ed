"""A ``tokenizers`` tokenizer from the metadata of a GGUF file.

Token types and pre-tokenizer names: gguf.md and llama-vocab of llama.cpp; the patterns are those of the models' own
``tokenizer.json`` files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from polyaccel.backend.errors import ModelLoadError
from polyaccel.weights.gguf_file import GGUFFile

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_LONGEST_TOKEN = 4096
_GPT2 = ("default", "gpt-2", "gpt2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_SPLITS: Mapping[str, str] = MappingProxyType(
    {
        "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
_SPLIT_OF: Mapping[str, str] = MappingProxyType(
    {**dict.fromkeys(_LLAMA3, "llama3"), "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2", "tekken": "tekken"}
)


def build_gguf_tokenizer(file: GGUFFile) -> tokenizers.Tokenizer:
    """Build the tokenizer that ``file`` describes, without a post-processor.

    Kinds "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE, rebuilt with byte fallback). Raises ModelLoadError for
    other kinds, unknown pre-tokenizers and inconsistent vocabularies.
    """
    import tokenizers

    kind = file.text("tokenizer.ggml.model")
    tokens = file.strings("tokenizer.ggml.tokens")
    if len(dict.fromkeys(tokens)) != len(tokens):
        raise ModelLoadError(f"{file.path}: the vocabulary has {len(tokens)} tokens, some of them twice")
    types = _token_types(file, len(tokens))
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(file, tokens)
        elif kind == "llama":
            tokenizer = _sentencepiece(file, tokens, types)
        else:
            raise ModelLoadError(f"{file.path}: tokenizer {kind[:60]!r} is not supported; 'gpt2' and 'llama' are")
        control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL and token]
        defined = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _USER_DEFINED and token]
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(token, normalized=False, special=True) for token in control]
        )
        tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in defined])
    except ModelLoadError:
        raise
    except Exception as cause:  # the package raises plain Exception
        raise ModelLoadError(f"{file.path}: the tokenizer cannot be built ({str(cause)[:200]})") from cause
    return tokenizer


def adds_bos(file: GGUFFile) -> bool:
    """Whether a prompt begins with the beginning-of-sequence token."""
    default = file.text("tokenizer.ggml.model") == "llama" or file.text("tokenizer.ggml.pre", "") in _LLAMA3
    return file.flag("tokenizer.ggml.add_bos_token", default)


def _token_types(file: GGUFFile, count: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in file.metadata:
        return [_NORMAL] * count
    types = file.numbers("tokenizer.ggml.token_type")
    if types.size != count or not np.issubdtype(types.dtype, np.integer):
        raise ModelLoadError(f"{file.path}: {types.size} token types for {count} tokens")
    result: list[int] = types.tolist()
    return result


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    pairs = []
    for merge in file.strings("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not left or not space or not right:
            raise ModelLoadError(f"{file.path}: the merge {merge[:80]!r} is not two tokens")
        pairs.append((left, right))
    return pairs


def _byte_level(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.text("tokenizer.ggml.pre", "default")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(file), ignore_merges=pre in _LLAMA3))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        tokenizer.pre_tokenizer = gpt2
    elif pre in _DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif pre in _SPLIT_OF:
        split = pre_tokenizers.Split(Regex(_SPLITS[_SPLIT_OF[pre]]), behavior="isolated", invert=False)
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        if _SPLIT_OF[pre] == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    else:
        known = ", ".join((*_GPT2, *_DIGITS, *_SPLIT_OF))
        raise ModelLoadError(f"{file.path}: pre-tokenizer {pre[:60]!r} is not supported; supported are {known}")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = (
        _merges(file) if "tokenizer.ggml.merges" in file.metadata else list(_merges_from_scores(file, tokens, types))
    )
    unknown = file.integer("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown < len(tokens):
        raise ModelLoadError(f"{file.path}: the unknown token is {unknown}, beyond the {len(tokens)} tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefixed = file.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefixed else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefixed else steps)
    return tokenizer


def _merges_from_scores(file: GGUFFile, tokens: list[str], types: list[int]) -> Iterator[tuple[str, str]]:
    """SentencePiece merges whichever pair makes the token of the highest score, so scores order the merges."""
    scores = file.numbers("tokenizer.ggml.scores")
    if scores.size != len(tokens):
        raise ModelLoadError(f"{file.path}: {scores.size} scores for {len(tokens)} tokens")
    pieces = {
        token: index
        for index, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (_NORMAL, _USER_DEFINED)
    }
    ranked: list[tuple[float, int, str, str]] = []
    for token, index in pieces.items():
        if len(token) > _LONGEST_TOKEN:
            raise ModelLoadError(f"{file.path}: token {index} has {len(token)} characters, more than {_LONGEST_TOKEN}")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                ranked.append((-float(scores[index]), -cut, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    return ((left, right) for _, _, left, right in ranked)
