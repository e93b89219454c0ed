"""What each rank's process runs: it opens the backend, joins the others, and does what the parent says."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from polyaccel.backend import PolyaccelError, RankAddress
from polyaccel_conformance.multi.bench import RankBench
from polyaccel_conformance.multi.control import Piped, RankVerdict, RunCase, RunControl
from polyaccel_conformance.multi.identity import RankIdentity
from polyaccel_conformance.multi.lockstep import ask_control, run_on_rank
from polyaccel_conformance.subject import Subject

TARGET = "polyaccel_conformance.multi.worker:main"


def main(
    connection: Connection,
    subject: Mapping[str, Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    withheld: float,
) -> None:
    """Serve until the parent closes the pipe.

    ``folder``: where ranks meet; ``timeout`` is that of collectives, ``withheld`` of those that are meant to fail, in
    seconds.
    """
    faulthandler.enable(sys.stderr)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        control = Piped(rank, world_size, connection)
        try:
            bench, identity = _open(Subject(**subject), control, Path(folder), timeout, withheld)
        except Exception as error:
            # Whatever a plugin raises while it starts must reach the parent in words.
            connection.send(RankVerdict(ending="refused", text=_words(error)))
            return
        connection.send(identity)
        try:
            _serve(connection, bench)
        finally:
            bench.comm.close()
            bench.backend.close()


def _open(
    subject: Subject, control: Piped, folder: Path, timeout: float, withheld: float
) -> tuple[RankBench, RankIdentity]:
    rank, world_size = control.rank, control.world_size
    backend = subject.open()
    devices = backend.devices()
    device = devices[rank % len(devices)]
    comm = backend.connect(
        RankAddress(rank=rank, world_size=world_size, init_method=f"file://{folder}/world", timeout=timeout)
    )
    bench = RankBench(backend, device, comm, control=control, folder=folder, timeout=timeout, withheld=withheld)
    return bench, RankIdentity.of(backend, device, comm)


def _serve(connection: Connection, bench: RankBench) -> None:
    while True:
        order = connection.recv()
        try:
            if isinstance(order, RunCase):
                verdict = run_on_rank(bench, order)
            elif isinstance(order, RunControl):
                verdict = ask_control(bench, order.check)
            else:
                # An answer to a question that this rank no longer waits for.
                continue
        except Exception as error:
            verdict = RankVerdict(ending="crashed", text=_words(error), broken=True)
        connection.send(verdict)


def _words(error: Exception) -> str:
    if isinstance(error, PolyaccelError):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception(error))
