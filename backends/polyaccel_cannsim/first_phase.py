"""Phase 1 of one aclnn function: reads a call and checks it, or knows it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .arguments import Arguments, Key
from .descriptor import AclTensor, Decoder
from .errors import Refused, Status
from .ledger import Call
from .registry import ByLists, Compute, Launch, Rule

_ACCEPTED = 1024
"""Accepted calls that are known again, for each function."""

Lists = tuple[tuple[int, ...] | None, ...]
Verdict = tuple[Lists, tuple[Any, ...], Compute]
"""Of the call's host lists: they, all of its arguments, and what computes it."""


class _Accepted:
    """What is known of calls with one key: their card, and the last one's verdict."""

    __slots__ = ("by_lists", "device", "verdict")

    def __init__(self, verdict: Verdict, device: int, by_lists: ByLists | None) -> None:
        self.verdict = verdict
        self.device = device
        self.by_lists = by_lists


class FirstPhase:
    """Of one function.

    A loop repeats its calls: to read and check them again costs more than most operators do. So a call that equals an
    accepted one is known again, down to addresses, if the rule allows it; one that differs from it in the host lists
    alone, as a decode step does from the one before, has these read and checked if the rule takes them apart.
    """

    def __init__(self, rule: Rule, decoder: Decoder, function: Callable[..., Any]) -> None:
        self._function = function
        self._apart = rule.lists_apart
        self._arguments = Arguments(rule.signature, rule.readers, decoder, self._apart)
        self._repeats = rule.pure and self._arguments.comparable and not rule.asks_size
        self._accepted: dict[Key, _Accepted] = {}

    def __call__(self, raw: Sequence[Any], call: Call) -> Any:
        """What the rule answers to C's arguments; notes what they are, and whose memory, in ``call``.

        Raises:
            Refused: by the rule.
        """
        arguments = self._arguments
        key = arguments.key(raw) if self._repeats else None
        found = None if key is None else self._accepted.get(key)
        if found is None:
            return self._checked(raw, call, key)
        lists, values, compute = found.verdict
        if found.by_lists is not None and (given := arguments.lists(raw)) != lists:
            call.arguments = values = arguments.with_lists(values, given)
            compute = found.by_lists(*given)
            found.verdict = given, values, compute
        call.arguments, call.device = values, found.device
        return compute

    def _checked(self, raw: Sequence[Any], call: Call, key: Key | None) -> Any:
        arguments = self._arguments
        call.arguments = arguments.decoded(raw)
        lists: Lists = ()
        by_lists: ByLists | None = None
        if self._apart:
            lists = arguments.lists(raw)
            by_lists = self._function(*arguments.without_lists(call.arguments))
            result: Any = by_lists(*lists)
        else:
            result = self._function(*call.arguments)
        if isinstance(result, Launch):
            return Launch(result.check, placed(call, result.compute))
        compute = placed(call, result) if callable(result) else result
        # A call that touches a foreign card's memory fails, whatever its lists: its closure is not the rule's.
        if key is not None and compute is result:
            if len(self._accepted) >= _ACCEPTED:
                self._accepted.clear()
            self._accepted[key] = _Accepted((lists, call.arguments, compute), call.device, by_lists)
        return compute


def placed(call: Call, compute: Compute) -> Compute:
    """Finds the call's card: with tensors of two, the closure that fails instead."""
    for one in call.tensors:
        if call.device < 0:
            call.device = one.device
        elif one.device != call.device and one.numel:
            return illegal_address(call.name, one, call.device)
    return compute


def illegal_address(name: str, tensor: AclTensor, device: int) -> Compute:
    """What a card does with memory that is not its own."""
    where = {-1: "pinned host memory", -2: "memory that no card owns, or past the end of an allocation"}
    place = where.get(tensor.device, f"memory of device {tensor.device}")

    def compute() -> None:
        raise Refused(
            Status.DEVICE_FAULT,
            f"The DDR address of the MTE instruction is out of range: {name} on device {device} reads {tensor!r} at "
            f"{tensor.address:#x}, which is {place}",
            "EZ9999",
        )

    return compute
