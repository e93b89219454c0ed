"""Errors of the suite itself, and the exit codes of its commands."""

from __future__ import annotations

from enum import IntEnum

from polyaccel.backend import PolyaccelError


class ExitCode(IntEnum):
    """What ``polyaccel conformance`` returns to the shell."""

    PASS = 0
    FAIL = 1
    USAGE = 2
    INCONCLUSIVE = 3
    DEVICE_LOST = 4
    DIFFERENT_FAILURE = 5
    """``replay`` only: the case fails, but not as its file says."""


class ConformanceError(PolyaccelError):
    """The suite could not do what was asked; says nothing about the backend."""


class UsageError(ConformanceError):
    """A command, file or option is wrong."""
