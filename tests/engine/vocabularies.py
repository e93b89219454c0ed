"""Small tokenizers for tests: a SentencePiece-like and several byte-level ones, as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tests.weights.files import model_tensors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 1234 times faster than 12 others.",
    "  indented\n\n\tcode = value[0] + other(x)  # comment\nI'll we're they've\n\n\n   ",
    "naïve café 你好世界 こんにちは 한국어 🙂👍 don't DON'T 3.14159 1,000,000",
] * 3


def byte_level(split: str | None = None, size: int = 600) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary trained on a few lines; ``split`` is the pre-tokenizer's pattern."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, plain])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=lambda token: model["vocab"][token])
    return tokens, [" ".join(merge) for merge in model["merges"]]


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece BPE vocabulary with all 256 byte tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>", "<extra>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, CONTROL]
    words = ["▁", *"abcdehilnorstuwxyzé,.!<>0x你"]
    pieces = ["th", "he", "▁t", "▁th", "▁the", "the", "in", "▁a", "an", "▁an", "nd", "▁and", "er", "on", "re", "▁▁"]
    pieces += ["▁▁▁▁", "ll", "▁he", "▁hell", "llo", "▁hello", "aa", "aaa", "aaaa", "▁wo", "▁wor", "ld", "▁world", "o▁"]
    scores = [0.0] * len(tokens)
    rank = 0.0
    for token in [*pieces, *words]:
        if token not in tokens:
            rank -= 1.0
            tokens.append(token)
            types.append(NORMAL)
            scores.append(rank)
    return tokens, scores, types


def write_vocabulary(
    path: Path,
    kind: str,
    tokens: list[str],
    types: list[int],
    *,
    merges: list[str] | None = None,
    scores: list[float] | None = None,
    pre: str | None = None,
    **keys: object,
) -> Path:
    """A GGUF file with a tiny llama model and this vocabulary; ``keys`` are further ``tokenizer.ggml`` entries."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for key, value in keys.items():
        name = f"tokenizer.ggml.{key}" if key != "chat_template" else "tokenizer.chat_template"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, str(value))
    random = np.random.default_rng(0)
    tensors = {
        **model_tensors("llama"),
        "token_embd.weight": random.standard_normal((len(tokens), 64), dtype=np.float32),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sentencepiece(path: Path, **keys: object) -> Path:
    tokens, scores, types = sentencepiece()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_vocabulary(path, "llama", tokens, types, scores=scores, **{**ids, **keys})


def write_byte_level(path: Path, pre: str, split: str | None = None, **keys: object) -> Path:
    tokens, merges = byte_level(split)
    extra = ["<|begin|>", "<|end|>", "<|turn|>", "<think>", "<|endoftext|>"]
    types = [*[NORMAL] * len(tokens), CONTROL, CONTROL, CONTROL, USER_DEFINED, CONTROL]
    size = len(tokens)
    ids = {"bos_token_id": size, "eos_token_id": size + 1, "eot_token_id": size + 2}
    return write_vocabulary(path, "gpt2", [*tokens, *extra], types, merges=merges, pre=pre, **{**ids, **keys})
