"""Progress bars: only where a person is watching."""

from __future__ import annotations

import io
import os
import pty
import sys
import termios
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr

import pytest

from polyaccel.observe.progress import ProgressBar

MARK = b"<end>"


class Terminal:
    """A pseudo-terminal in the place of stderr; :meth:`shown` is what a person would have seen since it was asked."""

    def __init__(self) -> None:
        self._reader, self._writer = pty.openpty()
        termios.tcsetwinsize(self._writer, (24, 80))

    @contextmanager
    def watched(self) -> Iterator[None]:
        # Between the fixtures and the test pytest puts its own stderr back: this is for the test itself.
        with open(self._writer, "w", encoding="utf-8", closefd=False) as stream, redirect_stderr(stream):
            assert sys.stderr.isatty()
            yield

    def shown(self) -> str:
        # What is written to a terminal reaches its reader a little later; nothing overtakes the mark.
        os.write(self._writer, MARK)
        shown = b""
        while not shown.endswith(MARK):
            shown += os.read(self._reader, 65_536)
        return shown.removesuffix(MARK).decode()

    def close(self) -> None:
        os.close(self._writer)
        os.close(self._reader)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with closing(Terminal()) as opened:
        yield opened


def test_a_bar_on_a_terminal_names_what_it_counts(terminal: Terminal) -> None:
    with terminal.watched():
        bar = ProgressBar("generating", unit="answers")
        bar(0, 8)
        bar.close()
    shown = terminal.shown()
    assert "generating" in shown
    assert "0/8" in shown
    assert "answers" in shown


def test_a_bar_goes_to_the_number_done(terminal: Terminal) -> None:
    with terminal.watched(), ProgressBar("generating", unit="answers") as bar:
        for done in (0, 3, 8):
            bar(done, 8)
        assert bar._bar is not None
        assert (bar._bar.n, bar._bar.total) == (8, 8)


def test_bytes_are_shown_in_binary_units(terminal: Terminal) -> None:
    with terminal.watched(), ProgressBar("loading", unit="B") as bar:
        bar(0, 3 * 2**20)
    assert "0.00/3.00M" in terminal.shown()


def test_a_closed_bar_leaves_an_empty_line(terminal: Terminal) -> None:
    with terminal.watched(), ProgressBar("loading", unit="B") as bar:
        bar(1, 2)
    first, *others = terminal.shown().split("\r")
    assert others
    assert (first + others[-1]).strip() == ""


def test_nothing_is_shown_before_the_first_call(terminal: Terminal) -> None:
    with terminal.watched(), ProgressBar("loading", unit="B"):
        pass
    assert terminal.shown() == ""


def test_a_disabled_bar_shows_nothing_on_a_terminal(terminal: Terminal) -> None:
    with terminal.watched(), ProgressBar("loading", unit="B", enabled=False) as bar:
        bar(0, 10)
        bar(10, 10)
    assert terminal.shown() == ""


def test_nothing_is_shown_where_stderr_is_no_terminal() -> None:
    stream = io.StringIO()
    with redirect_stderr(stream), ProgressBar("loading", unit="B") as bar:
        bar(0, 10)
        bar(10, 10)
    assert stream.getvalue() == ""


def test_closing_again_does_nothing(terminal: Terminal) -> None:
    with terminal.watched():
        bar = ProgressBar("loading", unit="B")
        bar.close()
        bar(1, 2)
        bar.close()
    assert "loading" in terminal.shown()
    with terminal.watched():
        bar.close()
    assert terminal.shown() == ""


def test_a_bar_that_is_told_less_than_before_goes_back(terminal: Terminal) -> None:
    with terminal.watched(), ProgressBar("generating", unit="answers") as bar:
        for done in (5, 2, 4):
            bar(done, 8)
            assert bar._bar is not None
            assert bar._bar.n == done


def test_an_error_inside_closes_the_bar_and_is_passed_on(terminal: Terminal) -> None:
    with terminal.watched():
        bar = ProgressBar("generating", unit="answers")

    def fail() -> None:
        with bar:
            bar(1, 8)
            assert bar._bar is not None
            raise RuntimeError("inside")

    with terminal.watched(), pytest.raises(RuntimeError, match="inside"):
        fail()
    assert bar._bar is None
