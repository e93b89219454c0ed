"""Work on a thread that ends with it."""

from __future__ import annotations

import threading

import pytest

from polyaccel.parallel.thread import call_on_fresh_thread


def test_a_result_comes_back_from_another_thread_that_is_gone_afterwards() -> None:
    ran_on = call_on_fresh_thread(threading.current_thread)
    assert ran_on is not threading.current_thread()
    assert not ran_on.is_alive()


def test_an_error_comes_back_as_itself_and_the_thread_is_gone() -> None:
    before = threading.active_count()

    def fail() -> None:
        raise KeyError("missing")

    with pytest.raises(KeyError, match="missing"):
        call_on_fresh_thread(fail)
    assert threading.active_count() == before


def test_an_interrupt_raised_inside_is_not_swallowed() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_on_fresh_thread(interrupt)
