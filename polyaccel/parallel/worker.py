"""The program of a worker process: ``python -m polyaccel.parallel.worker CONNECTION_FD LIFELINE_FD``.

Starting workers as a module of their own, rather than by forking or re-importing the caller's script, makes an
unguarded script, a prompt and a notebook work alike. The worker runs what its first message names and ends with its
parent: the lifeline is a pipe that nobody writes to, and its end of file means that the parent is gone, however it
went.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection


def main(connection_fd: int, lifeline_fd: int) -> None:
    """Serve one parent. The first message is ``(module, function, arguments)``; it is called as
    ``function(connection, *arguments)``."""
    threading.Thread(target=_end_with_parent, args=(lifeline_fd,), name="lifeline", daemon=True).start()
    # Ctrl-C reaches the whole process group of a terminal; what it means is the parent's to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(connection_fd)
    try:
        module, function, arguments = connection.recv()
        getattr(importlib.import_module(module), function)(connection, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        connection.close()


def _end_with_parent(lifeline_fd: int) -> None:
    # A step may be inside a collective that will never complete: nothing gentler than _exit ends it.
    os.read(lifeline_fd, 1)
    os._exit(3)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of collective libraries may outlive the group; there is nothing left to clean up in this process.
    os._exit(0)
