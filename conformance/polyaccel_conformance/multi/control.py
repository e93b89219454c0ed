"""The control plane: what ranks tell each other outside of the communicator under test."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, Protocol

from polyaccel_conformance.check import CaseResult, Control
from polyaccel_conformance.errors import ConformanceError


class Abandoned(ConformanceError):
    """Another rank has ended the case, so that nobody can be waited for any more."""


class ControlPlane(Protocol):
    """What a check may ask of the other ranks, in the same order on all of them."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, topic: str, value: object = None) -> list[object]:
        """Every rank's small picklable value, in rank order; returns when all have called it on the same topic.

        Raises:
            Abandoned: a rank does not call it any more.
        """


@dataclass(frozen=True, slots=True)
class Alone:
    """The control plane of a world of one."""

    rank: int = 0
    world_size: int = 1

    def gather(self, topic: str, value: object = None) -> list[object]:
        return [value]


@dataclass(frozen=True, slots=True)
class Piped:
    """A control plane over a pipe to the parent, which knows every rank and when one is gone."""

    rank: int
    world_size: int
    connection: Connection

    def gather(self, topic: str, value: object = None) -> list[object]:
        self.connection.send(Gather(topic, value))
        answer = self.connection.recv()
        if isinstance(answer, Gathered):
            return list(answer.values)
        raise Abandoned(f"rank {self.rank} waits for ranks that have ended the case")


# -- messages from a rank to the parent --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gather:
    """This rank's contribution; it waits for everybody's on the same topic."""

    topic: str
    value: object


Ending = Literal["finished", "abandoned", "refused", "crashed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankVerdict:
    """How a rank ended a case or a control.

    Attributes:
        ending: ``finished``; ``abandoned`` because another rank had ended; ``refused``: it could not be started;
            ``crashed`` by something that is no error of the contract.
        result: of a case that finished, with its axes as JSON.
        control: of a control that finished.
        text: of an error.
        broken: the communicator is of no more use.
    """

    ending: Ending
    result: CaseResult | None = None
    control: Control | None = None
    text: str = ""
    broken: bool = False


# -- messages from the parent to a rank --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gathered:
    """Every rank's contribution."""

    values: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nobody will contribute any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCase:
    """``case`` as JSON; ``checks`` by name."""

    case: dict[str, object]
    checks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunControl:
    """The control of a check by name."""

    check: str
