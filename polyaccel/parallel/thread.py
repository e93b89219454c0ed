"""Threads that end with the one thing they were started for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


def call_on_fresh_thread(function: Callable[[], R], name: str = "polyaccel-once") -> R:
    """Run a function on a thread of its own, wait for it, and return its result or raise its error.

    An OpenMP runtime keeps a pool of workers for every thread that has run a parallel loop, for as long as that thread
    lives. Once the pools together have more threads than the machine has cores, GNU OpenMP's workers sleep between
    loops instead of spinning: a decode step of SmolLM2 at batch 8 on two cores took 53 ms instead of 42. So work that
    precedes or accompanies the engine's own thread must leave no pool behind.
    """
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        return future.result()
    finally:
        thread.join()
