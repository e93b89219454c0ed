"""How a backend says what it can do: queries, reasons and table entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from polyaccel.backend.spec import Numerics
from polyaccel.backend.step import TokenClass

Static = int | float | str | bool | None | tuple[int, ...]

Reason = str
"""Why an implementation refuses a query: one sentence with the limit and the value asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What the plan asks about one operator at one site.

    ``static`` holds exact dimensions: ``dtype``, ``k``, ``slices`` (output widths), ``heads``, ``kv_heads``,
    ``head_dim``, ``hidden``, ``world_size``, ``quantised``, ``group_size``, ``experts``, ``top_k``, ``largest_rank``
    and attributes of the operator. ``ranges`` holds what varies between steps as inclusive ``(low, high)``:
    ``tokens``, ``segments``, ``context``. Answers must depend on nothing else, and be the same on every rank.
    """

    site: str
    operator: str
    token_class: TokenClass
    adapters: bool
    static: Mapping[str, Static] = field(default_factory=lambda: MappingProxyType({}))
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))

    def for_part(self, operator: str) -> Query:
        """The query of a station's part at the same site."""
        return replace(self, operator=operator)

    def integer(self, name: str, default: int = 0) -> int:
        value = self.static.get(name, default)
        return value if isinstance(value, int) else default


Supports = Callable[[Query], list[Reason]]


def _always(query: Query) -> list[Reason]:
    return []


@dataclass(frozen=True, slots=True)
class Entry:
    """A native implementation of an operator or station.

    Attributes:
        fn: callable with the specification's arguments.
        supports: reasons why not, empty for yes; pure and host-only.
        numerics: declared arithmetic where it differs from the contract's floor.
        evidence: what it may execute: custom operators, kernel names or aten operators, for checks from outside.
        name: kernel family shown in the plan; default ``<backend>.<operator>``.
        detail: a choice worth showing, such as ``ride`` or ``add`` for a row-parallel station.
    """

    fn: Callable[..., object]
    supports: Supports = _always
    numerics: Numerics | None = None
    evidence: tuple[str, ...] = ()
    name: str = ""
    detail: str = ""
