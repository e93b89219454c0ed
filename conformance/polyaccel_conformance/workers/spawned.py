"""A process started afresh for a plugin that cannot follow a fork: ``python -m polyaccel_conformance.workers.spawned``.

Arguments: file descriptor of the connection, target, arguments as JSON, log file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from multiprocessing.connection import Connection

from polyaccel_conformance.workers.server import redirect, run_target


def main() -> None:
    """Run the target on the inherited connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, target, arguments, log = sys.argv[1:5]
    os.set_inheritable(int(descriptor), False)
    redirect(log)
    import torch

    torch.set_num_threads(1)
    run_target(target, Connection(int(descriptor)), json.loads(arguments))


if __name__ == "__main__":
    main()
