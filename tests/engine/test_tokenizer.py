from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from polyaccel.backend.errors import ModelLoadError, RequestRejected
from polyaccel.engine.gguf_tokenizer import _SPLITS
from polyaccel.engine.tokenizer import Tokenizer
from polyaccel.weights.locate import ModelFiles, locate_model
from tests.engine.vocabularies import (
    CONTROL,
    NORMAL,
    byte_level,
    sentencepiece,
    write_byte_level,
    write_sentencepiece,
    write_vocabulary,
)

TEXT = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=st.sampled_from("🙂👍🏽👨‍👩‍👧é́ñ你好世界こんにちは한국어\u200d\u0301\ufffd\ufeff"), max_size=20),
    st.text(alphabet=" \t\n\r\u00a0\u3000ab", max_size=30),
    st.text(alphabet="0123456789 .,-+ab\n", max_size=30),
    st.lists(
        st.sampled_from(
            ["def f(x):\n    return x[0]\n", "it's", " DON'T", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "  ",
             "\n\n", "hello", " world", "12345", " 7", "<s>", "</s>", "<unk>", "<0x0A>", "▁", "Ġ", "www.x.y/z?q=1"]
        ),
        max_size=8,
    ).map("".join),
)  # fmt: skip
CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]


def reference(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.load(locate_model(smollm2_path))


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_path: Path) -> Any:
    """transformers' tokenizer with the model's own pre-tokenizer, single digits first, which it does not derive."""
    tokenizer = reference(smollm2_path)
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    return tokenizer


@pytest.mark.model
@settings(max_examples=200)
@given(text=TEXT)
@example(text="What is   123 + 45?\n\n\t 6 <|im_end|> é 🙂 你好")
def test_smollm2_encodes_and_decodes_as_transformers(smollm2: Tokenizer, smollm2_reference: Any, text: str) -> None:
    ids = smollm2.encode(text)
    assert ids == smollm2_reference.encode(text)
    assert smollm2.encode(text, add_special_tokens=False) == smollm2_reference.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert smollm2.decode(ids, skip_special_tokens=skip) == smollm2_reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.model
def test_smollm2_text_survives_encoding_and_decoding(smollm2: Tokenizer) -> None:
    # NOTE: the vocabulary lacks some bytes, so this holds for ordinary text only.
    text = "What is   123 + 45?\n\n\t 6 <|im_end|> é 🙂 你好 naïve it's\n"
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text
    assert smollm2.decode(smollm2.encode(text)) == text.replace("<|im_end|>", "")


@pytest.mark.model
@settings(max_examples=60)
@given(text=TEXT.map(lambda text: "".join(mark for mark in text if not mark.isnumeric())))
def test_smollm2_without_digits_encodes_as_transformers_reads_the_file(
    smollm2: Tokenizer, smollm2_reference: Any, text: str
) -> None:
    backend = smollm2_reference.backend_tokenizer
    before = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    try:
        assert smollm2.encode(text) == smollm2_reference.encode(text)
    finally:
        backend.pre_tokenizer = before


@pytest.mark.model
def test_smollm2_has_the_tokens_and_the_template_of_its_file(smollm2: Tokenizer, smollm2_reference: Any) -> None:
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_ids) == (49152, 1, (2,))
    assert smollm2.special_ids == tuple(range(17))
    assert smollm2.is_byte_level
    assert smollm2.chat_template == smollm2_reference.chat_template
    for prompt in (True, False):
        ours = smollm2.apply_chat_template(CHAT, add_generation_prompt=prompt)
        theirs = smollm2_reference.apply_chat_template(CHAT, add_generation_prompt=prompt, tokenize=False)
        assert ours == theirs
    ids = smollm2.encode(smollm2.apply_chat_template(CHAT[:1]), add_special_tokens=False)
    assert ids[:4] == [1, 9690, 198, 2683]


@pytest.mark.model
def test_a_batch_is_encoded_like_its_texts(smollm2: Tokenizer) -> None:
    texts = ["", "one", "two two <|im_end|>", "3" * 50]
    assert smollm2.encode_batch(texts) == [smollm2.encode(text) for text in texts]
    assert smollm2.encode_batch([]) == []


@pytest.mark.model
@given(ids=st.lists(st.integers(0, 49151), max_size=12))
def test_token_bytes_are_what_decode_joins(smollm2: Tokenizer, ids: list[int]) -> None:
    joined = b"".join(smollm2.token_bytes(index) for index in ids)
    assert smollm2.decode(ids, skip_special_tokens=False) == joined.decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    path = write_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "m.gguf")
    return Tokenizer.load(locate_model(path)), reference(path)


@settings(max_examples=200)
@given(text=st.one_of(TEXT, st.text(alphabet="thean dlowr,é你x0<>A▁ ", max_size=30)))
@example(text="hello world aaaaaaa  the end")
@example(text=" </s> hello<tool>  x")
def test_a_sentencepiece_vocabulary_is_rebuilt_as_in_transformers(pieces: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pieces
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ids[0] == ours.bos_token_id == 1
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False) == ids[1:]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_sentencepiece_vocabulary_knows_its_kinds_of_tokens(pieces: tuple[Tokenizer, Any]) -> None:
    ours, _ = pieces
    tokens = sentencepiece()[0]
    assert not ours.is_byte_level
    assert [index for index in range(len(tokens)) if ours.is_byte_token(index)] == list(range(3, 259))
    assert ours.special_ids == (0, 1, 2, tokens.index("<extra>"))
    assert (ours.token(0), ours.token(10**6), ours.vocab_size) == ("<unk>", None, len(tokens))


def test_the_space_before_a_text_can_be_switched_off(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "m.gguf", add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    ours, tokens = Tokenizer.load(locate_model(path)), sentencepiece()[0]
    assert [tokens[index] for index in ours.encode("hello")] == ["he", "llo", "</s>"]
    assert ours.decode(ours.encode(" hello")) == " hello"


@pytest.fixture(scope="module", params=["llama-bpe", "qwen2", "tekken", "gpt-2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    pre = request.param
    split = _SPLITS.get({"llama-bpe": "llama3"}.get(pre, pre))
    path = write_byte_level(tmp_path_factory.mktemp("byte-level") / "m.gguf", pre, split)
    return pre, Tokenizer.load(locate_model(path)), reference(path)


@settings(max_examples=100)
@given(text=TEXT)
@example(text="the 12345 DON'T\n\n   x<think>y<|end|>")
def test_a_byte_level_vocabulary_is_rebuilt_as_in_transformers(trained: tuple[str, Tokenizer, Any], text: str) -> None:
    pre, ours, theirs = trained
    # NOTE: the models with this pre-tokenizer normalise their text, which transformers does not derive from the file.
    text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    expected = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=False) == expected
    assert ours.encode(text) == ([ours.bos_token_id, *expected] if pre == "llama-bpe" else expected)
    assert ours.decode(expected, skip_special_tokens=False) == text


def test_qwen2_text_is_normalised(trained: tuple[str, Tokenizer, Any]) -> None:
    pre, ours, _ = trained
    composed, decomposed = "\u00e9", "e\u0301"
    assert (ours.encode(composed) == ours.encode(decomposed)) == (pre == "qwen2")


def test_all_ids_that_end_a_turn_are_known(trained: tuple[str, Tokenizer, Any]) -> None:
    _, ours, _ = trained
    size = len(byte_level(None)[0]) if trained[0] == "gpt-2" else ours.vocab_size - 5
    assert (ours.bos_token_id, ours.eos_token_ids) == (size, (size + 1, size + 2))
    assert ours.special_ids == (size, size + 1, size + 2, size + 4)


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("saved")
    if request.param == "sentencepiece":
        path = write_sentencepiece(folder / "m.gguf")
    else:
        path = write_byte_level(folder / "m.gguf", "llama-bpe", _SPLITS["llama3"], add_bos_token=True)
    tokenizer = reference(path)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder / "hf")
    (folder / "hf" / "config.json").write_text('{"eos_token_id": [2, 5]}')
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder / "hf", transformers.AutoTokenizer.from_pretrained(folder / "hf")


@given(text=TEXT)
def test_a_saved_tokenizer_is_read_as_transformers_reads_it(saved: tuple[Path, Any], text: str) -> None:
    folder, theirs = saved
    ours = Tokenizer.load(locate_model(folder))
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_saved_tokenizer_has_its_companions(saved: tuple[Path, Any]) -> None:
    folder, theirs = saved
    ours = Tokenizer.load(locate_model(folder))
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == tuple(dict.fromkeys((theirs.eos_token_id, 7, 2, 5)))
    assert ours.vocab_size == len(theirs)
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)
    assert set(theirs.all_special_ids) <= set(ours.special_ids)


def minimal(folder: Path, **files: object) -> ModelFiles:
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<s>": 2}, "merges": []},
        "decoder": None,
    }
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, content in files.items():
        path = folder / (name.replace("__", ".") if "__" in name else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return locate_model(folder)


def test_special_tokens_may_be_written_as_objects_and_added_late(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "added_tokens_decoder": {"9": {"content": "<x>", "special": True}, "8": {"content": "<y>", "special": False}},
        "add_bos_token": True,
    }
    tokenizer = Tokenizer.load(minimal(tmp_path, tokenizer_config=config))
    assert (tokenizer.token(3), tokenizer.token(4)) == ("<y>", "<x>")
    assert tokenizer.bos_token_id == 2
    assert tokenizer.eos_token_ids == (5,)
    assert tokenizer.encode("a<x><y>") == [2, 0, 4, 3]
    assert tokenizer.special_ids == (2, 4, 5)


def test_a_template_file_goes_before_the_one_in_the_configuration(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.load(minimal(tmp_path, tokenizer_config={"chat_template": named})).chat_template == "D"
    assert Tokenizer.load(minimal(tmp_path, tokenizer_config={"chat_template": "C"})).chat_template == "C"
    files = minimal(tmp_path, tokenizer_config={"chat_template": "C"}, chat_template__jinja="J")
    assert Tokenizer.load(files).chat_template == "J"


def test_truncation_and_padding_that_a_file_asks_for_are_not_applied(tmp_path: Path) -> None:
    files = minimal(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.load(files).encode("abab") == [0, 1, 0, 1]


@pytest.mark.parametrize("content", ["", "{}", "[]", "nonsense", '{"model": {"type": "Nope"}}', "\x00"])
def test_a_broken_tokenizer_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    files = minimal(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: not a usable tokenizer"):
        Tokenizer.load(files)


def test_a_folder_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    files = minimal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        Tokenizer.load(files)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match="save_pretrained"):
        Tokenizer.load(files)


@pytest.mark.parametrize(
    ("kind", "keys", "reason"),
    [
        ("wordpiece", {}, "'wordpiece' is not supported; 'gpt2' and 'llama' are"),
        ("gpt2", {"pre": "strange"}, "pre-tokenizer 'strange' is not supported; supported are default"),
        ("gpt2", {"merges": ["ab"]}, "merge 'ab' is not two tokens"),
        ("gpt2", {"merges": ["a q"]}, "cannot be built"),
        ("gpt2", {"tokens": ["a", "a"], "types": [1, 1]}, "some of them twice"),
        ("gpt2", {"types": [1]}, "1 token types for 3 tokens"),
        ("gpt2", {"bos_token_id": 99}, "bos_token is id 99, which is not in the vocabulary"),
        ("llama", {"scores": [1.0]}, "1 scores for 3 tokens"),
        ("llama", {"unknown_token_id": 77, "scores": [0.0] * 3}, "unknown token is 77"),
        ("llama", {}, "have no 'tokenizer.ggml.scores'"),
        ("llama", {"tokens": ["a", "b" * 5000, "c"], "scores": [0.0] * 3}, "5000 characters"),
    ],
)
def test_an_unusable_vocabulary_in_a_gguf_file_is_refused_by_name(
    tmp_path: Path, kind: str, keys: dict[str, Any], reason: str
) -> None:
    values: dict[str, Any] = {"tokens": ["a", "b", "c"], "types": [NORMAL, NORMAL, CONTROL], **keys}
    if kind == "gpt2":
        values.setdefault("merges", [])
    if not values.get("merges", [""]):
        values["merges"] = ["a b"]
        values["tokens"] = [*values["tokens"], "ab"]
        values["types"] = [*values["types"], NORMAL] if len(values["types"]) > 1 else values["types"]
        reason = reason.replace("for 3", "for 4")
    path = write_vocabulary(tmp_path / "m.gguf", kind, **values)
    with pytest.raises(ModelLoadError, match=f"m.gguf.*{reason}"):
        Tokenizer.load(locate_model(path))


@pytest.mark.parametrize("text", [None, 3, b"x", ["a"], "\ud800", "a\udfff"])
def test_what_is_no_text_is_rejected(pieces: tuple[Tokenizer, Any], text: Any) -> None:
    with pytest.raises(RequestRejected, match="text 0"):
        pieces[0].encode(text)


@pytest.mark.parametrize("ids", [[-1], [2**32], [2**70], ["a"], [1.5], [None]])
def test_what_are_no_ids_is_rejected(pieces: tuple[Tokenizer, Any], ids: Any) -> None:
    with pytest.raises(RequestRejected, match="cannot be decoded"):
        pieces[0].decode(ids)


def test_ids_without_a_token_are_left_out(pieces: tuple[Tokenizer, Any]) -> None:
    ours, _ = pieces
    assert ours.decode([10**6, *ours.encode("hello"), 10**7]) == "hello"


def test_a_model_without_template_rejects_a_chat(pieces: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(RequestRejected, match="no chat template"):
        pieces[0].apply_chat_template(CHAT)


def test_a_broken_template_fails_at_the_first_chat_and_not_before(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(minimal(tmp_path, tokenizer_config={"chat_template": "{% if %}"}))
    assert tokenizer.encode("ab") == [0, 1]
    with pytest.raises(ModelLoadError, match="chat template cannot be compiled"):
        tokenizer.apply_chat_template(CHAT)


CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=3)


@settings(max_examples=100)
@given(name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]), changes=CHANGES)
def test_a_mutated_tokenizer_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[float, int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    config = {"bos_token": "<s>", "added_tokens_decoder": {"3": {"content": "<y>"}}, "chat_template": "x"}
    files = minimal(folder, tokenizer_config=config, generation_config={"eos_token_id": [1]})
    content = (folder / name).read_bytes()
    for share, gone, new in changes:
        at = int(share * len(content))
        content = content[:at] + new + content[at + gone :]
    (folder / name).write_bytes(content)
    try:
        tokenizer = Tokenizer.load(files)
        text = tokenizer.decode(tokenizer.encode("ab<s>"))
    except (ModelLoadError, RequestRejected):
        return
    assert isinstance(text, str)


def test_a_decoder_of_several_steps_with_bytes_is_byte_level(pieces: tuple[Tokenizer, Any]) -> None:
    _, theirs = pieces
    backend = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs.backend_tokenizer).backend_tokenizer
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert Tokenizer(backend).is_byte_level
    backend.decoder = decoders.Fuse()
    assert not Tokenizer(backend).is_byte_level
