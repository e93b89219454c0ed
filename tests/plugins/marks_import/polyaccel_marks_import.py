"""Leaves a mark when it is imported, so that a test can tell whether it was."""

from __future__ import annotations

import os
from pathlib import Path

from polyaccel.backend import TableBackend

with Path(os.environ["POLYACCEL_IMPORT_MARKS"]).open("a", encoding="utf-8") as marks:
    marks.write(f"{__name__}\n")


class MarkingBackend(TableBackend):
    """Plain torch; never chosen by ``auto``."""

    def __init__(self) -> None:
        super().__init__("cpu", {})
