from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyaccel.engine.detokenizer import IncrementalDetokenizer
from polyaccel.engine.tokenizer import Tokenizer
from polyaccel.weights.locate import locate_model
from tests.engine.vocabularies import write_byte_level, write_sentencepiece


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(locate_model(write_byte_level(tmp_path_factory.mktemp("bytes") / "m.gguf", "gpt-2")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(locate_model(write_sentencepiece(tmp_path_factory.mktemp("pieces") / "m.gguf")))


@pytest.fixture(scope="module")
def unprefixed(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_sentencepiece(tmp_path_factory.mktemp("unprefixed") / "m.gguf", add_space_prefix=False)
    return Tokenizer.load(locate_model(path))


@pytest.fixture(scope="module", params=["byte_level", "pieces", "unprefixed"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Tokenizer)
    return found


@st.composite
def cut(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    marks = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8), label="cuts"))
    return [ids[a:b] for a, b in zip([0, *marks], [*marks, len(ids)], strict=True)]


def check(tokenizer: Tokenizer, ids: list[int], pieces: list[list[int]], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    expected, emitted = tokenizer.decode(ids, skip_special_tokens=skip), ""
    for piece in pieces:
        emitted += detokenizer.push(piece)
        assert expected.startswith(emitted)
    assert emitted + detokenizer.finish() == expected


@settings(max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_ids_make_the_whole_text(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    # NOTE: two ids beyond the vocabulary, and small ones more often: those are bytes and special tokens.
    size = tokenizer.vocab_size
    ids = data.draw(st.lists(st.integers(0, size + 1) | st.integers(0, 40), max_size=20), label="ids")
    check(tokenizer, ids, data.draw(cut(ids), label="pieces"), skip)
    check(tokenizer, ids, [[index] for index in ids], skip)


@settings(max_examples=200)
@given(text=st.text(max_size=20) | st.text(alphabet="🙂é你好 the ▁<s>", max_size=20), data=st.data())
@example(text="naïve 🙂 你好", data=None)
def test_pieces_of_a_text_make_the_text(tokenizer: Tokenizer, text: str, data: st.DataObject | None) -> None:
    ids = tokenizer.encode(text)
    pieces = [[index] for index in ids] if data is None else data.draw(cut(ids), label="pieces")
    check(tokenizer, ids, pieces, skip=False)


def test_a_character_is_emitted_with_its_last_byte_and_not_before(byte_level: Tokenizer) -> None:
    spelled = {byte_level.token_bytes(index): index for index in range(byte_level.vocab_size)}
    detokenizer = IncrementalDetokenizer(byte_level)
    emitted = [detokenizer.push([spelled[bytes([byte])]]) for byte in "a🙃b".encode()]
    assert emitted == ["a", "", "", "", "🙃", "b"]
    assert detokenizer.finish() == ""


def test_bytes_that_form_no_character_come_out_as_soon_as_that_is_certain(byte_level: Tokenizer) -> None:
    spelled = {byte_level.token_bytes(index): index for index in range(byte_level.vocab_size)}
    detokenizer = IncrementalDetokenizer(byte_level)
    assert detokenizer.push([spelled[b"\xf0"]]) == ""
    assert detokenizer.push([spelled[b"a"]]) == "\ufffda"
    assert detokenizer.push([spelled[b"\xe4"], spelled[b"\xbd"]]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_run_of_byte_tokens_is_held_until_it_ends(pieces: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(pieces)
    smile = pieces.encode("🙂", add_special_tokens=False)[-4:]
    assert all(pieces.is_byte_token(index) for index in smile)
    assert [detokenizer.push([index]) for index in smile] == [""] * 4
    after = pieces.encode("the", add_special_tokens=False)
    assert detokenizer.push(after).startswith("🙂")
    detokenizer.push(smile[:2])
    assert detokenizer.finish() == "\ufffd\ufffd"


def test_work_does_not_grow_with_what_went_before(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        lengths.append(len(ids))
        return decode(self, ids, skip_special_tokens=skip_special_tokens)

    ids = tokenizer.encode("the end and the world " * 200, add_special_tokens=False)
    monkeypatch.setattr(Tokenizer, "decode", counted)
    detokenizer = IncrementalDetokenizer(tokenizer)
    for index in ids:
        detokenizer.push([index])
    assert sum(lengths) <= 4 * len(ids)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.load(locate_model(smollm2_path))


@pytest.mark.model
@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=30), data=st.data(), skip=st.booleans())
def test_pieces_of_smollm2_make_the_whole_text(
    smollm2: Tokenizer, ids: list[int], data: st.DataObject, skip: bool
) -> None:
    check(smollm2, ids, data.draw(cut(ids), label="pieces"), skip)
