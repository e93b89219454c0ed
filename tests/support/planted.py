"""Planted bugs: a backend's sources with a small wrong edit, in a folder of their own before the true sources on the
path of fresh processes. Name, plan and declarations stay the backend's own unless they are the bug."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Edit:
    """``old``, which is in the file exactly once, becomes ``new``."""

    file: str
    old: str
    new: str


def sources(package: str) -> Path:
    """Where a package's true sources are."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def misplaced(package: str, edits: Sequence[Edit]) -> list[str]:
    """Edits that do not fit the sources as they are."""
    found = []
    for edit in edits:
        count = (sources(package) / edit.file).read_text(encoding="utf-8").count(edit.old)
        if count != 1:
            found.append(f"{edit.file}: {count} times {edit.old!r}")
    return found


def plant(package: str, edits: Sequence[Edit], folder: Path) -> None:
    """The package with the edits in ``folder``."""
    target = folder / package
    shutil.copytree(sources(package), target, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        path = target / edit.file
        text = path.read_text(encoding="utf-8")
        assert text.count(edit.old) == 1, f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times"
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")


def environment(folder: Path) -> Mapping[str, str]:
    """Variables of a process that finds the package of ``folder`` before any other."""
    rest = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), rest] if rest else [str(folder)])}


def run(command: Sequence[str], folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """A command that sees the package of ``folder``."""
    return subprocess.run(
        command,
        env=dict(environment(folder)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


def by_test(test: str, folder: Path, seconds: float) -> tuple[str, str]:
    """What a test of this project, or all of a file, finds wrong with the package, empty if nothing; and its name."""
    # The configured path would put the true sources first.
    path = f"pythonpath={folder} . conformance backends"
    words = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-o", path]
    done = run([sys.executable, "-m", "pytest", *words, test], folder, seconds)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout.splitlines()[-1], done.stdout[-500:]
    name = test.rpartition("::")[2]
    if done.returncode == 0:
        return "", name
    lines = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    return (lines[0] if lines else "failed"), f"{Path(test.partition('::')[0]).stem}::{name}"
