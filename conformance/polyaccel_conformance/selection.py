"""The ``-k`` expression: words of a case joined by ``and``, ``or``, ``not`` and parentheses."""

from __future__ import annotations

import re
from collections.abc import Callable

from polyaccel_conformance.case import Case
from polyaccel_conformance.errors import UsageError

Selects = Callable[[Case], bool]

_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")


def text_of(case: Case) -> str:
    """What words are looked for in: ``linear dtype=float32 dims.k=16 ... seed=7 key=0f...``."""
    axes = " ".join(f"{path}={value}" for path, value in case.axes().items())
    return f"{case.operator} {axes} seed={case.seed} key={case.key}"


def parse(expression: str) -> Selects:
    """A test of cases. A word is found anywhere in :func:`text_of`, except that one with ``=`` must be a whole entry.

    Raises:
        UsageError: the expression is malformed.
    """
    if not expression.strip():
        return lambda case: True
    tokens = _TOKEN.findall(expression)
    try:
        selects, rest = _or(tokens)
    except IndexError:
        raise UsageError(f"-k {expression!r} ends too early") from None
    if rest:
        raise UsageError(f"-k {expression!r}: {rest[0]!r} is not expected there")
    return lambda case: selects(text_of(case))


Test = Callable[[str], bool]


def _or(tokens: list[str]) -> tuple[Test, list[str]]:
    left, rest = _and(tokens)
    while rest and rest[0] == "or":
        right, rest = _and(rest[1:])
        left = _either(left, right)
    return left, rest


def _and(tokens: list[str]) -> tuple[Test, list[str]]:
    left, rest = _not(tokens)
    while rest and rest[0] == "and":
        right, rest = _not(rest[1:])
        left = _both(left, right)
    return left, rest


def _not(tokens: list[str]) -> tuple[Test, list[str]]:
    word = tokens[0]
    if word == "not":
        inner, rest = _not(tokens[1:])
        return (lambda text: not inner(text)), rest
    if word == "(":
        inner, rest = _or(tokens[1:])
        if rest[0] != ")":
            raise UsageError(f"-k: {rest[0]!r} where a closing parenthesis is expected")
        return inner, rest[1:]
    if word in (")", "and", "or"):
        raise UsageError(f"-k: {word!r} where a word is expected")
    if "=" in word:
        return (lambda text: word in text.split(" ")), tokens[1:]
    return (lambda text: word in text), tokens[1:]


def _either(left: Test, right: Test) -> Test:
    return lambda text: left(text) or right(text)


def _both(left: Test, right: Test) -> Test:
    return lambda text: left(text) and right(text)
