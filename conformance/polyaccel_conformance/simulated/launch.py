"""How a kernel is launched: through the guarded launcher, into the current stream of what is then current."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from polyaccel.backend import Launcher
from polyaccel_conformance.simulated.runtime import Runtime, named
from polyaccel_conformance.simulated.stream import Task
from polyaccel_conformance.simulated.tensor import VirtualTensor, empty_on

Shape = tuple[Sequence[int], torch.dtype]


def launch(
    launcher: Launcher,
    kernel: str,
    operands: Mapping[str, torch.Tensor | None],
    effect: Callable[[], object],
    outputs: Sequence[Shape] = (),
) -> list[torch.Tensor]:
    """Allocate ``outputs`` and submit ``effect``, whose result (a tensor or a tuple of them) fills them.

    Both happen inside the launcher's guard, on the current device: as with a vendor's runtime, nothing but the guard
    makes that the device of the operands.

    Raises:
        OperatorError: operands on different devices, named.
    """
    runtime = _runtime(operands)

    def issue() -> list[torch.Tensor]:
        device = runtime.current_device
        made = [empty_on(device, shape, dtype) for shape, dtype in outputs]

        def run() -> None:
            results = effect()
            found = results if isinstance(results, tuple) else (results,)
            for target, result in zip(made, found, strict=False):
                if isinstance(result, torch.Tensor):
                    target.copy_(result)

        infos = named([*operands.items(), *((f"output {i}", tensor) for i, tensor in enumerate(made))])
        runtime.submit(Task(kernel=kernel, call=run, operands=infos, rank=launcher.rank))
        return list(made)

    return launcher.launch(kernel, operands, issue)


def _runtime(operands: Mapping[str, torch.Tensor | None]) -> Runtime:
    for tensor in operands.values():
        if isinstance(tensor, VirtualTensor):
            return tensor.memory.device.runtime
    raise TypeError(f"none of the operands {sorted(operands)} is on a simulated device")
