"""What the system says about processes and open files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def wait_gone(pids: Iterable[int], seconds: float = 10.0) -> bool:
    """Whether all of them have ended within this time."""
    deadline = time.monotonic() + seconds
    waiting = list(pids)
    while any(map(is_running, waiting)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, waiting))


def children(pid: int | None = None) -> list[int]:
    """Child processes of this process, or of another one, zombies included."""
    parent = os.getpid() if pid is None else pid
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


def open_files() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
