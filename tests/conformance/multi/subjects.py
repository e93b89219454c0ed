"""Backends that the ranks of these tests open: each is found by its name in this file."""

from __future__ import annotations

from polyaccel.backend import Backend, TableBackend
from tests.backends.folded.backend import FoldedBackend


def composite() -> Backend:
    return TableBackend("cpu", {}, name="composites")


def folded() -> Backend:
    return FoldedBackend()
