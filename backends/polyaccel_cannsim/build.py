"""Compiles the libraries once for each set of sources, exported names and compiler, into the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .errors import BuildFailed, CompilerMissing
from .registry import MAX_WORKSPACE
from .symbols import EMPTY_LIBRARIES, assembly, unsimulated_source

_FLAGS = ("-shared", "-fPIC", "-O2", "-fvisibility=hidden", "-Wall")
_RUNTIME = (
    "error.c",
    "gil.c",
    "device.c",
    "memory.c",
    "legacy.c",
    "stream.c",
    "event.c",
    "transfer.c",
    "graph.c",
    "waits.c",
)
_UNUSED_SECONDS = 30 * 24 * 3600
LIBRARIES = ("ascendcl", *EMPTY_LIBRARIES, "hccl", "opapi")
"""In the order in which they are loaded."""


@dataclass(frozen=True)
class Names:
    """What the generated libraries export: aclnn names without ``GetWorkspaceSize`` (but with
    ``GetMaxWorkspaceSize``, which has no second phase), and HCCL names; both sorted."""

    aclnn: tuple[str, ...]
    hccl: tuple[str, ...]


def compiler(environment: Mapping[str, str] | None = None) -> list[str]:
    """The C compiler's command: ``$CC``, else the first of cc, gcc, clang.

    Raises:
        CompilerMissing: there is none.
    """
    env = os.environ if environment is None else environment
    if env.get("CC"):
        command = shlex.split(env["CC"])
        if shutil.which(command[0], path=env.get("PATH")) is None:
            raise CompilerMissing(f"CC={env['CC']}: no such program; set CC to a C compiler")
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name, path=env.get("PATH")):
            return [name]
    raise CompilerMissing(
        "the simulated CANN libraries are compiled on first use, and there is no cc, gcc or clang on PATH; "
        "install one (Debian: apt-get install gcc libc6-dev) or set CC"
    )


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """``$XDG_CACHE_HOME/polyaccel/cannsim``."""
    env = os.environ if environment is None else environment
    base = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME") or Path.home()) / ".cache")
    return Path(base) / "polyaccel" / "cannsim"


def build(names: Names, torch_npu_version: str) -> Path:
    """The folder with the libraries of this set of names, compiled now if it is not in the cache.

    Several processes may call it at once: each compiles aside and one rename wins.

    Raises:
        CompilerMissing: nothing is cached and there is no compiler.
        BuildFailed: the compiler refused; its words are in the message.
    """
    machine = platform.machine()
    texts = _texts(names, machine)
    # The command as written names the compiler; asking it for its version would cost every start a process.
    command = shlex.join(shlex.split(os.environ["CC"])) if os.environ.get("CC") else "default"
    key = hashlib.sha256(
        repr((sorted(texts.items()), LIBRARIES, machine, command, torch_npu_version, _FLAGS)).encode()
    ).hexdigest()[:20]
    folder = cache_folder() / key
    if (folder / "complete").exists():
        _touch(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _prune(folder.parent)
    aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    try:
        _compile(aside, texts, compiler())
        (aside / "complete").touch()
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "complete").exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _texts(names: Names, machine: str) -> dict[str, str]:
    sources = resources.files(__package__) / "csrc"
    texts = {name: (sources / name).read_text("utf-8") for name in (*_RUNTIME, "opapi.c", "cannsim.h", "stream.h")}
    texts["unsimulated.c"] = unsimulated_source()
    launched = [one for one in names.aclnn if not one.endswith(MAX_WORKSPACE)]
    first = [one if one.endswith(MAX_WORKSPACE) else f"{one}GetWorkspaceSize" for one in names.aclnn]
    texts["opapi.s"] = assembly(machine, "cannsim_opapi", first, launched)
    texts["hccl.s"] = assembly(machine, "cannsim_hccl", names.hccl)
    return texts


def _compile(folder: Path, texts: Mapping[str, str], command: Sequence[str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    (folder / "empty.c").write_text("", "utf-8")
    runtime = ["-L.", "-Wl,--no-as-needed", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
    jobs = [("ascendcl", [*_RUNTIME, "unsimulated.c"], ["-lpthread", "-ldl"])]
    jobs += [(name, ["empty.c"], runtime) for name in EMPTY_LIBRARIES]
    jobs += [("hccl", ["hccl.s"], runtime), ("opapi", ["opapi.c", "opapi.s"], runtime)]
    for name, sources, libraries in jobs:
        library = f"lib{name}.so"
        line = [*command, *_FLAGS, f"-Wl,-soname,{library}", "-o", library, *sources, *libraries]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise BuildFailed(f"{shlex.join(line)} ended with {done.returncode}:\n{done.stderr.strip()}")


def _touch(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a cache of somebody else may be read-only
        os.utime(folder)


def _prune(cache: Path) -> None:
    """Removes what no process has used for a month."""
    oldest = time.time() - _UNUSED_SECONDS
    for folder in cache.iterdir():
        try:
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
