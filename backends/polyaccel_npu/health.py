"""Whether results of this worker's devices can still be trusted.

After one asynchronous failure torch_npu throws once; from then on its queue drops work without a word and later,
correct calls return whatever was in memory (NPUQueue.cpp: ERROR_EXIT, then CAN_EXIT). So the first such failure ends
everything.
"""

from __future__ import annotations

from collections.abc import Callable

from polyaccel.backend import DeviceLost, OperatorError
from polyaccel_npu.errors import NpuFailure

Blame = Callable[[], str]
"""Names the call that failed, in words; empty if it cannot."""


class Health:
    """Of one backend instance.

    Attributes:
        lost: why nothing can be trusted any more; None while all is well.
        blame: asked once, when the failure is found; None if it was not wanted.
    """

    def __init__(self, blame: Blame | None = None) -> None:
        self.lost: str | None = None
        self.blame = blame

    def check(self) -> None:
        """Raise if a failure was found before.

        Raises:
            DeviceLost: with that failure; results since are worth nothing.
        """
        if self.lost is not None:
            raise DeviceLost(self.lost)

    def lose(self, failure: NpuFailure, rank: int | None) -> DeviceLost:
        """Note an asynchronous failure, and give the error to raise."""
        where = "" if rank is None else f" on rank {rank}"
        text = f"{failure}{where}; results since the last wait for the device are worth nothing, restart the engine"
        if self.blame is not None and self.lost is None:
            found = self.blame()
            text += f"\n{found}" if found else ""
        elif self.lost is None:
            text += "\nto learn the exact call: blame=True, or run again with ASCEND_LAUNCH_BLOCKING=1"
        if self.lost is None:
            self.lost = text
        return DeviceLost(self.lost)

    def lose_to(self, error: OperatorError) -> None:
        """Note a failure that is known with its operands."""
        if self.lost is None:
            self.lost = str(error)
