"""``python -m polyaccel_conformance``."""

from __future__ import annotations

import sys

from polyaccel_conformance.cli import main

if __name__ == "__main__":
    sys.exit(main())
