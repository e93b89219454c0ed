"""What a start needs besides weights, prepared on a thread while they are copied."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

import torch

MODULES = ("polyaccel_cuda.operators", "polyaccel_cuda.stations", "polyaccel_cuda.adapter_store")


class WarmUp:
    """Does some work once, beside what else is done; :meth:`finish` waits for it and raises what it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._over = False

    def begin(self, work: Callable[[], None]) -> None:
        """Run ``work`` on a daemon thread. Nothing happens at a second call, nor after :meth:`finish`."""
        if self._thread is None and not self._over:
            self._thread = threading.Thread(target=self._run, args=(work,), name="polyaccel-warm-up", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until the work is done; raises its error, once. What is not begun by now is not worth a thread."""
        self._over = True
        if self._thread is not None:
            self._thread.join()
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


def prepare(device: torch.device) -> None:
    """Import the kernels, let Triton find out who it is (a checksum of its 400 MB) and load its driver, start cuBLAS.

    One kernel is launched, the first that a step launches anyway: Triton's first launch takes 0.2 s. torch hands the
    cuBLAS handle on to the next thread that asks for one.
    """
    for name in MODULES:
        importlib.import_module(name)
    runtime = importlib.import_module("triton.runtime")
    identify = getattr(importlib.import_module("triton.runtime.cache"), "triton_key", None)
    if identify is not None:
        identify()
    with torch.cuda.device(device):
        runtime.driver.active.get_current_target()
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        importlib.import_module("polyaccel_cuda.step").launch_once(device)
