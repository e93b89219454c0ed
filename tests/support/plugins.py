"""Plugins as users get them: built into wheels, installed beside the package, used by a Python of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "tests" / "plugins", ROOT / "tests" / "backends")
MARKS = "POLYACCEL_IMPORT_MARKS"
TIMEOUT = 240.0


class PluginHouse:
    """Builds each plugin once and installs sets of them into folders of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wheels: dict[str, Path] = {}
        self._sites: dict[tuple[str, ...], Path] = {}

    def site(self, *names: str) -> Path:
        """A folder with the named plugins (folders of tests/plugins or tests/backends) installed, and nothing else.

        The same folder for the same names; it is not to be changed (see :meth:`fresh_site`).
        """
        if names not in self._sites:
            self._sites[names] = self._install(names, self._folder / "sites" / "+".join(names))
        return self._sites[names]

    def fresh_site(self, folder: Path, *names: str) -> Path:
        """The same in a folder of the caller's own."""
        return self._install(names, folder)

    def _install(self, names: tuple[str, ...], target: Path) -> Path:
        self._build([name for name in names if name not in self._wheels])
        wheels = [str(self._wheels[name]) for name in names]
        _pip("install", "--no-deps", "--target", str(target), *wheels)
        return target

    def _build(self, names: list[str]) -> None:
        if not names:
            return
        copies = {name: self._folder / "sources" / name for name in names}
        for name, copy in copies.items():
            # Building writes into the source tree; the checkout stays clean.
            shutil.copytree(_source(name), copy, ignore=shutil.ignore_patterns("__pycache__"))
        wheels = self._folder / "wheels"
        _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), *map(str, copies.values()))
        for name, copy in copies.items():
            self._wheels[name] = next(wheels.glob(f"{_distribution(copy)}-*.whl"))


def install_source(source: Path, work: Path, target: Path) -> Path:
    """Build the distribution in ``source`` into a wheel below ``work`` and install it, alone, into ``target``."""
    copy = work / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(work / "wheels"), str(copy))
    _pip("install", "--no-deps", "--target", str(target), *map(str, (work / "wheels").glob("*.whl")))
    return target


def _source(name: str) -> Path:
    return next(folder / name for folder in SOURCES if (folder / name / "pyproject.toml").is_file())


def _distribution(source: Path) -> str:
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["name"]).replace("-", "_")


def _pip(command: str, *arguments: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-index")
    run = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert run.returncode == 0, f"pip {command} failed:\n{run.stdout}{run.stderr}"


def environment(*sites: Path, cache: Path | None = None, marks: Path | None = None) -> dict[str, str]:
    """Environment variables under which Python sees the checkout and these folders.

    ``cache``: where stevedore keeps what it found; ``marks``: the file in which plugins note that they were imported.
    """
    path = os.pathsep.join(map(str, (*sites, ROOT, ROOT / "conformance")))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        variables["XDG_CACHE_HOME"] = str(cache)
    if marks is not None:
        variables[MARKS] = str(marks)
    return variables


def python(code: str, variables: Mapping[str, str], *arguments: str) -> str:
    """What the program prints; its failure is the test's."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=dict(variables),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}{run.stderr}"
    return run.stdout


def cli(variables: Mapping[str, str], *arguments: str, timeout: float = TIMEOUT) -> tuple[int, str, str]:
    """Exit code, output and error output of ``polyaccel ARGUMENTS``."""
    run = subprocess.run(
        [sys.executable, "-m", "polyaccel.cli.main", *arguments],
        env=dict(variables),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return run.returncode, run.stdout, run.stderr
