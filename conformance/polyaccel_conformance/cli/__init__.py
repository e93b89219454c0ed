"""``polyaccel conformance COMMAND``, or ``python -m polyaccel_conformance COMMAND``."""

from __future__ import annotations

from polyaccel_conformance.cli.main import main

__all__ = ["main"]
