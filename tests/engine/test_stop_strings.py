from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import RequestRejected
from polyaccel.engine.stop_strings import StopStrings

TEXT = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4)


def run(stops: list[str], pieces: list[str], *, include_stop: bool = False) -> tuple[str, str | None]:
    watcher = StopStrings(stops, include_stop=include_stop)
    emitted, matched = "", None
    for piece in pieces:
        text, matched = watcher.push(piece)
        emitted += text
        if matched is not None:
            break
    return emitted + watcher.finish(), matched


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, found by looking at every beginning of the text."""
    for end in range(len(text) + 1):
        ready = [stop for stop in stops if text[:end].endswith(stop)]
        if ready:
            longest = max(ready, key=len)
            return text[: end - len(longest)], longest
    return text, None


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    marks = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6), label="cuts"))
    return [text[a:b] for a, b in zip([0, *marks], [*marks, len(text)], strict=True)]


@given(text=TEXT, stops=STOPS, data=st.data())
def test_the_first_complete_stop_string_ends_the_text_however_it_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    pieces = data.draw(cut(text), label="pieces")
    before, matched = expected(stops, text)
    assert run(stops, pieces) == (before, matched)
    assert run(stops, pieces, include_stop=True) == (before + (matched or ""), matched)


@given(text=TEXT, stops=STOPS, data=st.data())
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str], data: st.DataObject) -> None:
    watcher = StopStrings(stops)
    emitted = ""
    seen = ""
    for piece in data.draw(cut(text), label="pieces"):
        out, matched = watcher.push(piece)
        emitted, seen = emitted + out, seen + piece
        if matched is not None:
            return
        held = seen[len(emitted) :]
        assert seen == emitted + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        longest = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert len(held) == longest


def test_nothing_is_emitted_after_a_match() -> None:
    watcher = StopStrings(["stop"])
    assert watcher.push("go sto") == ("go ", None)
    assert watcher.matched is None
    assert watcher.push("p and more") == ("", "stop")
    assert watcher.push("even more") == ("", "stop")
    assert watcher.matched == "stop"
    assert watcher.finish() == ""


def test_text_held_back_in_vain_comes_with_finish_once() -> None:
    watcher = StopStrings(["stop"])
    assert watcher.push("sto") == ("", None)
    assert watcher.finish() == "sto"
    assert watcher.finish() == ""


def test_without_stop_strings_all_text_passes() -> None:
    assert StopStrings([]).push("any") == ("any", None)


@pytest.mark.parametrize("stops", ["stop", [""], ["a", ""], [3], [None], [b"x"]])
def test_what_is_no_list_of_stop_strings_is_refused(stops: list[str]) -> None:
    with pytest.raises(RequestRejected, match="stop"):
        StopStrings(stops)
