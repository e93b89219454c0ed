"""The bench of one rank: a communicator under test, and a control plane beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from polyaccel.backend import Backend, Communicator, Device, RankAddress, SingleRank
from polyaccel.backend.plan import Policy
from polyaccel_conformance.bench import Bench, Resolved
from polyaccel_conformance.multi.control import Alone, ControlPlane
from polyaccel_conformance.problem import Prepared

Call = Callable[..., object]


class RankBench(Bench):
    """A backend, this rank's device and communicator, and the way to the other ranks.

    ``folder``: where groups of ranks meet; ``timeout``: seconds that their collectives wait; ``withheld``: seconds that
    collectives wait which are meant to fail.
    """

    def __init__(
        self,
        backend: Backend,
        device: Device,
        comm: Communicator,
        *,
        control: ControlPlane,
        folder: Path,
        timeout: float,
        withheld: float,
        policy: Policy = "allow",
    ) -> None:
        super().__init__(backend, device, comm, policy=policy)
        self.control = control
        self.folder = folder
        self.timeout = timeout
        self.withheld = withheld
        self._groups = [0]

    @property
    def rank(self) -> int:
        return self.control.rank

    @property
    def world_size(self) -> int:
        return self.control.world_size

    def group(self, members: Sequence[int], timeout: float | None = None) -> Communicator | None:
        """A further communicator of ``members``, in this order; None on other ranks, which call this all the same.

        Raises:
            CommunicationError: not all of them could be joined.
        """
        self._groups[0] += 1
        if self.rank not in members:
            return None
        if len(members) == 1:
            return SingleRank()
        name = "-".join(str(member) for member in members)
        return self.backend.connect(
            RankAddress(
                rank=list(members).index(self.rank),
                world_size=len(members),
                init_method=f"file://{self.folder}/group-{self._groups[0]}-{name}",
                timeout=self.timeout if timeout is None else timeout,
            )
        )

    def alone(self) -> RankBench:
        """The same device in a world of one, with whatever is wrong on this bench."""
        return _SpoiledBench(self, lambda call: call, alone=True)

    def spoiled(self, spoil: Callable[[Call], Call]) -> RankBench:
        """The same bench on which every planned call is replaced by something wrong: for controls."""
        return _SpoiledBench(self, spoil)


class _SpoiledBench(RankBench):
    def __init__(self, bench: RankBench, spoil: Callable[[Call], Call], *, alone: bool = False) -> None:
        super().__init__(
            bench.backend,
            bench.device,
            SingleRank() if alone else bench.comm,
            control=Alone() if alone else bench.control,
            folder=bench.folder,
            timeout=bench.timeout,
            withheld=bench.withheld,
        )
        # Names of meeting places are never used twice.
        self._groups = bench._groups
        self._inner, self._spoil = bench, spoil

    def resolve(self, operator: str, prepared: Prepared) -> Resolved:
        found = self._inner.resolve(operator, prepared)
        return Resolved(call=self._spoil(found.call), planned=found.planned)


def rank_bench(bench: Bench) -> RankBench:
    """The bench as a rank's.

    Raises:
        TypeError: a bench of a process that is no rank.
    """
    if not isinstance(bench, RankBench):
        raise TypeError("this check is asked by the ranks of a pool only")
    return bench
