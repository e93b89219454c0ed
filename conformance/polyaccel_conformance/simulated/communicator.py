"""Collectives in the order of a stream, over another communicator that works on host tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from polyaccel.backend import Communicator, Launcher
from polyaccel_conformance.simulated.launch import Shape, launch
from polyaccel_conformance.simulated.runtime import Runtime
from polyaccel_conformance.simulated.tensor import VirtualTensor


class SimulatedCommunicator(Communicator):
    """Each collective is a kernel; its transport is that of ``inner``, its devices are simulated."""

    def __init__(self, inner: Communicator, runtime: Runtime, launcher: Launcher) -> None:
        super().__init__()
        self.rank, self.world_size = inner.rank, inner.world_size
        self.transport = f"{inner.transport} (simulated devices)"
        self._inner, self._runtime, self._launcher = inner, runtime, launcher

    def gather_objects(self, value: object) -> list[object]:
        # All ranks have queued the same collectives; running them first keeps the order alike.
        self._finish()
        return self._inner.gather_objects(value)

    def close(self) -> None:
        self._inner.close()

    def _all_reduce(self, x: torch.Tensor) -> None:
        self._run("all_reduce", x, lambda host: self._inner.all_reduce(host))

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        self._run("broadcast", x, lambda host: self._inner.broadcast(host, source))

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] *= self.world_size
        return self._run("all_gather", x, lambda host: self._inner.all_gather(host, dim), [(shape, x.dtype)])[0]

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0] // self.world_size, *x.shape[1:])
        return self._run("reduce_scatter", x, lambda host: self._inner.reduce_scatter(host), [(shape, x.dtype)])[0]

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        shape = (sum(receive_rows), *x.shape[1:])
        return self._run(
            "all_to_all", x, lambda host: self._inner.all_to_all(host, send_rows, receive_rows), [(shape, x.dtype)]
        )[0]

    def _barrier(self) -> None:
        self._finish()
        self._inner.barrier()

    def _finish(self) -> None:
        for device in self._runtime.devices:
            self._runtime.wait_device(device)

    def _run(
        self,
        kind: str,
        x: torch.Tensor,
        collective: Callable[[torch.Tensor], torch.Tensor],
        outputs: list[Shape] | None = None,
    ) -> list[torch.Tensor]:
        assert isinstance(x, VirtualTensor)
        host = x.host

        def effect() -> torch.Tensor | None:
            result = collective(host)
            return result if outputs else None

        return launch(self._launcher, f"simulated.{kind}", {"x": x}, effect, outputs or ())
