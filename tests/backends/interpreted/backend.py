"""The CUDA backend on the CPU's memory: kernels run in Triton's interpreter; products, copies and ranks are torch's."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel.backend import Availability, Backend, Communicator, Device, Launcher, RankAddress, Reason, TorchDevice
from polyaccel_cuda.backend import CudaBackend


class InterpretedBackend(CudaBackend):
    """Float32 and float16 only: the interpreter multiplies the bits of bfloat16 as integers (Triton 3.6)."""

    name = "interpreted"
    priority = None
    isolate = False
    fork_safe = True

    def __init__(self, *, attention: str = "triton") -> None:
        super().__init__(attention=attention)
        self.launcher = Launcher(self.ledger)
        self._device = TorchDevice("cpu")

    def probe(self) -> Availability:
        return Availability(usable=True, devices=(self._device.name,))

    def devices(self) -> Sequence[Device]:
        return (self._device,)

    def graph_refusals(self) -> list[Reason]:
        return ["interpreted kernels are not captured"]

    def connect(self, address: RankAddress) -> Communicator:
        return Backend.connect(self, address)
