"""Collectives that a device never finishes: noticed from the host, and given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from polyaccel.backend import CommunicationError

LOOKS_A_TIMEOUT = 20
"""How often within the timeout the watch looks, so that it is late by a twentieth at most."""


class Mark(Protocol):
    """A place in a device's queue, as ``torch.cuda.Event``."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


def told_nothing() -> str:
    """Of a group whose ranks tell one another nothing."""
    return ""


class Watch:
    """Looks after the collectives of one group from a thread of its own, until closed.

    A collective that waits for a rank which never comes keeps its GPU busy for ever, and the host in whatever it waits
    for. Work whose mark has not been reached ``timeout`` seconds after it was set is given up: ``give_up`` makes the
    kernels of the group return, and :meth:`check` raises from then on. The same happens as soon as :meth:`abandon` is
    called, or ``told`` says that another rank did.

    Args:
        who: the group as errors name it.
        timeout: seconds.
        mark: makes a mark; called twice.
        give_up: ends the group's kernels, from the watch's thread; may be called while others wait for the device.
            Called once.
        told: why the group is of no more use, from the watch's thread; empty while it is.
    """

    def __init__(
        self,
        who: str,
        timeout: float,
        mark: Callable[[], Mark],
        give_up: Callable[[], None],
        told: Callable[[], str] = told_nothing,
    ) -> None:
        self._who, self._timeout, self._give_up, self._told = who, timeout, give_up, told
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        # One mark is waited for while the other follows what is issued.
        self._watched, self._latest = mark(), mark()
        self._watched_since: float | None = None
        self._latest_since: float | None = None
        self._kind = ""
        self._error: CommunicationError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="polyaccel-collectives", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        """Whether collectives were given up."""
        return self._error is not None

    def issued(self, kind: str) -> None:
        """Collectives ``kind`` were put into the device's current queue, which must not be recording a graph."""
        with self._lock:
            self._latest.record()
            self._kind, self._latest_since = kind, time.monotonic()

    def check(self) -> None:
        """Raise once collectives have been given up: what the device has computed since is worth nothing.

        Raises:
            CommunicationError: names the collective, the rank and the time waited.
        """
        if self._error is not None:
            raise CommunicationError(*self._error.args)

    def abandon(self, why: str) -> None:
        """Give up what there is at once. Returns when that is done, whoever began it."""
        self._end(CommunicationError(f"collectives on {self._who} were given up: {why}"))

    def close(self) -> None:
        """Stop looking. Idempotent; afterwards nothing is given up any more."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(min(self._timeout / LOOKS_A_TIMEOUT, 0.25)):
            try:
                kind = self._overdue()
            except RuntimeError as error:
                # The device itself has failed; whoever waits for it learns that, and of the group no more is known.
                self._end(CommunicationError(f"{self._kind} on {self._who} failed: {error}"))
                return
            if kind:
                self._end(
                    CommunicationError(
                        f"{kind} on {self._who} was given up after {self._timeout:g} s: a rank did not take part; "
                        "start all ranks again, or raise the timeout if ranks are only slow"
                    )
                )
                return
            why = self._told()
            if why:
                self.abandon(why)
                return

    def _end(self, error: CommunicationError) -> None:
        with self._ending:
            if self._error is None:
                self._error = error
                self._give_up()

    def _overdue(self) -> str:
        with self._lock:
            if self._watched_since is None and self._latest_since is not None:
                self._watched, self._latest = self._latest, self._watched
                self._watched_since, self._latest_since = self._latest_since, None
            if self._watched_since is None:
                return ""
            if self._watched.query():
                self._watched_since = None
                return ""
            return self._kind if time.monotonic() - self._watched_since > self._timeout else ""
