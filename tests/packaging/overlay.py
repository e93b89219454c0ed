"""Environments that hold one fresh install of polyaccel and borrow all else from the environment of this interpreter.

Installing torch for every form of the package would take minutes and gigabytes. An overlay is an empty virtual
environment whose only ``.pth`` file names a folder of links to the packages of this interpreter, without polyaccel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """One environment with polyaccel installed as ``kind``, from ``source``."""

    kind: str
    source: Path
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        return _site(self.folder)

    def run(self, *command: str) -> str:
        """Standard output of a program of this environment, run outside every source tree."""
        program = [str(self.folder / "bin" / command[0]), *command[1:]]
        return run(program, self.folder)


def run(command: list[str], folder: Path) -> str:
    """Standard output of a command; a failure shows all that it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_sources(folder: Path) -> Path:
    """The files that are, or would be, committed: what a fresh clone holds, with no left-over of earlier builds."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def build(source: Path, output: Path) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist alone."""
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)], output.parent)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


def link_dependencies(folder: Path) -> Path:
    """A folder of links to everything in this interpreter's site-packages except polyaccel itself."""
    folder.mkdir()
    for entry in sorted(Path(sysconfig.get_path("purelib")).iterdir()):
        own = entry.name.startswith("polyaccel") or "__editable__" in entry.name
        if not own and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def create(kind: str, requirement: Path, dependencies: Path, folder: Path) -> Overlay:
    """An overlay with ``requirement``, a file or (editable) a source tree, installed without its dependencies."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    (_site(folder) / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    overlay = Overlay(kind=kind, source=requirement, folder=folder)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    editable = ["--editable"] if kind == "editable" else []
    run([*PIP, "--python", str(overlay.python), "install", *options, *editable, str(requirement)], folder)
    return overlay


def _site(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
