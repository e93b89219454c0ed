"""What each rank's process runs: it opens the backend, joins the others, and does what the parent says."""

from __future__ import annotations

import contextlib
import os
import platform
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from polyaccel.backend import PolyaccelError, RankAddress
from polyaccel_conformance.multi.bench import RankBench
from polyaccel_conformance.multi.control import Piped, RankIdentity, RankVerdict, RunCase, RunControl
from polyaccel_conformance.multi.lockstep import ask_control, run_on_rank
from polyaccel_conformance.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """What a rank needs to know to start. Strings and numbers only.

    ``timeout`` is that of collectives, ``withheld`` of those that are meant to fail, in seconds.
    """

    subject: Subject
    rank: int
    world_size: int
    folder: str
    timeout: float
    withheld: float


def main(connection: Connection, options: RankOptions) -> None:
    """Serve until the parent closes the pipe."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            bench, identity = _open(connection, options)
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


def _open(connection: Connection, options: RankOptions) -> tuple[RankBench, RankIdentity]:
    backend = options.subject.open()
    devices = backend.devices()
    device = devices[options.rank % len(devices)]
    comm = backend.connect(
        RankAddress(
            rank=options.rank,
            world_size=options.world_size,
            init_method=f"file://{options.folder}/world",
            timeout=options.timeout,
        )
    )
    bench = RankBench(
        backend,
        device,
        comm,
        control=Piped(options.rank, options.world_size, connection),
        folder=Path(options.folder),
        timeout=options.timeout,
        withheld=options.withheld,
    )
    identity = RankIdentity(
        rank=options.rank,
        pid=os.getpid(),
        host=platform.node(),
        backend=backend.name,
        device=device.name,
        device_index=device.index,
        transport=comm.transport,
        torch_version=torch.__version__,
        simulated=bool(getattr(backend, "simulated", False)),
    )
    return bench, identity


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
