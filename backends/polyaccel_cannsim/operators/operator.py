"""One row of the operator table: an aclnn function, its arguments, its rule, and where both are written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import RuleError
from ..registry import LATER, MAX_WORKSPACE, ByLists, Compute, Launch, Rule, parse
from ..soc import CannVersion
from .environment import Communicator, Environment

if TYPE_CHECKING:
    from ..simulator import Simulator

Check = Callable[..., Compute | Launch | ByLists]
"""The first stage: (environment, *arguments) -> what runs, or Refusal. Reads no device memory."""

__all__ = ["LATER", "ByLists", "Check", "Compute", "Launch", "Operator", "aclnn"]

OLDEST = "8.0.RC1"


@dataclass(frozen=True)
class Operator:
    """A simulated aclnn function.

    `signature` are the words of `registry.parse` for the C arguments of `<name>GetWorkspaceSize`, without the last two
    (workspace size, executor). `serves` names the torch or torch_npu operators that end in it. `document` is where its
    signature and constraints are published. `since` is the first CANN version that exports it: from the document, from
    op-plugin's version checks, or, where both are silent, an estimate from the snapshots that have its page.
    `max_workspace`: `<name>GetMaxWorkspaceSize` is exported as well, which graphs ask before they are captured.
    `collective`: the rule asks for communicators, and so may answer equal calls differently; others cannot reach them.
    `lists_apart`: the rule reads lists of integers in a second part, as `registry.Rule` says: for those that every step
    of a model changes.
    """

    name: str
    signature: str
    check: Check
    serves: str
    document: str
    since: str = OLDEST
    max_workspace: bool = False
    collective: bool = False
    lists_apart: bool = False

    def __call__(self, environment: Environment, *arguments: Any) -> Compute | Launch:
        """Check the call, both parts of it; return what computes it."""
        if not self.lists_apart:
            return cast("Compute | Launch", self.check(environment, *arguments))
        named = list(zip(parse(self.name, self.signature), arguments, strict=True))
        first = (LATER if word == "ints" and one is not None else one for word, one in named)
        by_lists = cast(ByLists, self.check(environment, *first))
        return by_lists(*(one for word, one in named if word == "ints"))

    def rules(self, environment_of: Callable[[Simulator], Environment]) -> tuple[Rule, ...]:
        """The row for the simulator's registry."""

        def with_communicators(*arguments: Any, simulator: Simulator) -> Compute | Launch | ByLists:
            return self.check(environment_of(simulator), *arguments)

        def alone(*arguments: Any, simulator: Simulator) -> Compute | Launch | ByLists:
            return self.check(Environment(simulator.settings.soc.chip.value, _NoCommunicators()), *arguments)

        words = parse(self.name, self.signature)
        names = (self.name, f"{self.name}{MAX_WORKSPACE}") if self.max_workspace else (self.name,)
        since, function = CannVersion(self.since), with_communicators if self.collective else alone
        return tuple(
            Rule(
                *(name, words, function, self.document, since),
                wants_simulator=True,
                pure=not self.collective,
                lists_apart=self.lists_apart,
            )
            for name in names
        )


class _NoCommunicators:
    """For rules that are pure: an accepted call is not checked again, whatever its communicator has become."""

    def find(self, name: str) -> Communicator | None:
        raise RuleError(f"the operator asks for communicator {name!r}, but is not declared collective")


def aclnn(
    name: str,
    signature: str,
    *,
    serves: str,
    document: str,
    since: str = OLDEST,
    max_workspace: bool = False,
    collective: bool = False,
    lists_apart: bool = False,
) -> Callable[[Check], Operator]:
    """Make an Operator of a first stage. Raises RuleError where the signature does not parse."""
    parse(name, signature)

    def make(check: Check) -> Operator:
        return Operator(name, signature, check, serves, document, since, max_workspace, collective, lists_apart)

    return make
