"""The star-import, in a plugin's own test file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = """
from polyaccel_conformance.suite import *

BACKEND = {backend!r}
"""


@pytest.mark.parametrize(("backend", "code", "line"), [("cpu", 0, "1 passed"), ("null", 1, "1 failed")])
def test_one_import_tests_the_operators_that_are_selected(tmp_path: Path, backend: str, code: int, line: str) -> None:
    (tmp_path / "test_mine.py").write_text(FILE.format(backend=backend))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_operator and select_rows"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert line in done.stdout
    assert ("FAILED select_rows: values.exact" in done.stdout) is (code == 1)
