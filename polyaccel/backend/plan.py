"""The dispatch plan: which implementation runs where, decided at load and consulted on every call.

For each site the plan holds four answers: token class (decode, mixed) x with or without adapters. Every answer names an
implementation and every reason why a better one was refused, so that no fallback is silent.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from polyaccel.backend import stations
from polyaccel.backend.errors import UnsupportedError
from polyaccel.backend.failure import UNTYPED, argument_names, typed
from polyaccel.backend.guard import Launcher
from polyaccel.backend.ledger import COMPOSITE_PREFIX
from polyaccel.backend.placed import check_devices
from polyaccel.backend.step import Step, TokenClass, plan_key
from polyaccel.backend.support import Entry, Query, Static
from polyaccel.backend.vocabulary import OPERATORS

if TYPE_CHECKING:
    from polyaccel.backend.backend import Backend

logger = logging.getLogger("polyaccel.plan")

Policy = Literal["strict", "warn", "allow"]
Kind = Literal["fused", "native", "parts", "composite"]
Call = Callable[..., object]

KEYS: tuple[tuple[TokenClass, bool], ...] = (
    (TokenClass.DECODE, False),
    (TokenClass.DECODE, True),
    (TokenClass.MIXED, False),
    (TokenClass.MIXED, True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The answer for one operator: what runs and why nothing better does.

    ``kind``: a station is ``fused`` or ``parts``; an operator is ``native`` or ``composite``.
    """

    operator: str
    kind: Kind
    implementation: str
    detail: str = ""
    reasons: tuple[str, ...] = ()
    parts: tuple[Planned, ...] = ()

    def composites(self) -> list[Planned]:
        """This answer and its parts where they are composites."""
        own = [self] if self.kind == "composite" else []
        return own + [c for part in self.parts for c in part.composites()]

    def to_dict(self) -> dict[str, object]:
        return {
            "operator": self.operator,
            "kind": self.kind,
            "implementation": self.implementation,
            "detail": self.detail,
            "reasons": list(self.reasons),
            "parts": [part.to_dict() for part in self.parts],
        }

    def __str__(self) -> str:
        body = self.implementation if not self.parts else " + ".join(str(part) for part in self.parts)
        return f"{body} ({self.detail})" if self.detail else body


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRequest:
    """A place in the model where an operator or station is called. See :class:`Query` for ``static`` and ``ranges``."""

    site: str
    operator: str
    static: Mapping[str, Static] = field(default_factory=lambda: MappingProxyType({}))
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))

    def query(
        self, token_class: TokenClass, adapters: bool, largest_rank: int, ranges: Mapping[str, tuple[int, int]]
    ) -> Query:
        return Query(
            site=self.site,
            operator=self.operator,
            token_class=token_class,
            adapters=adapters,
            static={**self.static, "largest_rank": largest_rank if adapters else 0},
            ranges={**ranges, **self.ranges},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What a backend implements: its own entries and its composites, by operator or station."""

    table: Mapping[str, tuple[Entry, ...]]
    composites: Mapping[str, Call]

    @classmethod
    def by(cls, backend: Backend) -> Offered:
        return cls(table=backend.table(), composites=backend.composites())


class Site:
    """A planned place in the model: ``site[step](...)`` calls the implementation planned for that step."""

    __slots__ = ("_calls", "name", "operator", "planned")

    def __init__(self, name: str, operator: str) -> None:
        self.name = name
        self.operator = operator
        self.planned: tuple[Planned, ...] = ()
        self._calls: tuple[Call, ...] = ()

    def assign(self, planned: Sequence[Planned], calls: Sequence[Call]) -> None:
        self.planned, self._calls = tuple(planned), tuple(calls)

    def __getitem__(self, step: Step) -> Call:
        return self._calls[step.plan_key]

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls behind ``planned``, in the same order (:data:`KEYS`), for whoever has no step at hand."""
        return self._calls


class Plan:
    """Plans every site of a model on one backend.

    Args:
        backend: answers the queries.
        requests: the model's sites.
        policy: ``strict`` refuses composites of critical operators, ``warn`` logs them once, ``allow`` keeps quiet.
        ranges: inclusive ranges by token class name of what varies between steps.
        offered: what the backend implements, for whoever makes many plans of it; asked of it by default.

    Raises:
        UnsupportedError: under ``strict``, with every reason at every site; under any policy, when a mandatory
            operator has no implementation.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Iterable[SiteRequest],
        *,
        policy: Policy = "warn",
        ranges: Mapping[TokenClass, Mapping[str, tuple[int, int]]] | None = None,
        offered: Offered | None = None,
    ) -> None:
        self.backend = backend
        self.policy: Policy = policy
        self.largest_rank = 1
        self._ranges = dict(ranges or {})
        self._requests = {request.site: request for request in requests}
        self.sites = {name: Site(name, request.operator) for name, request in self._requests.items()}
        offered = Offered.by(backend) if offered is None else offered
        self._table, self._composites = offered.table, offered.composites
        self._warned: dict[str, None] = {}
        backend.ledger.strict = policy == "strict"
        self._apply(self._resolve_all(self.largest_rank))

    def __getitem__(self, site: str) -> Site:
        return self.sites[site]

    def extend(self, largest_rank: int) -> list[str]:
        """Re-plan the adapter columns for adapters up to ``largest_rank``; returns the sites whose answer changed.

        Raises:
            UnsupportedError: under ``strict``; the plan is unchanged.
        """
        if largest_rank <= self.largest_rank:
            return []
        resolved = self._resolve_all(largest_rank)
        changed = [
            name for name, answers in resolved.items() if tuple(p for p, _ in answers) != self.sites[name].planned
        ]
        self.largest_rank = largest_rank
        self._apply(resolved)
        return changed

    def digest(self) -> str:
        """Hash of every choice; ranks compare it. Independent of this rank's own dimensions."""
        choices = {name: [_choice(p) for p in site.planned] for name, site in self.sites.items()}
        text = json.dumps([self.backend.name, self.largest_rank, choices], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        return {
            "backend": self.backend.name,
            "policy": self.policy,
            "largest_rank": self.largest_rank,
            "digest": self.digest(),
            "sites": {
                name: {
                    f"{c.value}{'+adapters' if a else ''}": p.to_dict()
                    for (c, a), p in zip(KEYS, site.planned, strict=True)
                }
                for name, site in self.sites.items()
            },
        }

    # -- resolving ---------------------------------------------------------------------------------------------------

    def _resolve_all(self, largest_rank: int) -> dict[str, list[tuple[Planned, Call]]]:
        resolved: dict[str, list[tuple[Planned, Call]]] = {}
        for name, request in self._requests.items():
            answers = []
            for token_class, adapters in KEYS:
                query = request.query(token_class, adapters, largest_rank, self._ranges.get(token_class, {}))
                answers.append(self._resolve(query))
            resolved[name] = answers
        self._enforce(resolved)
        return resolved

    def _apply(self, resolved: Mapping[str, list[tuple[Planned, Call]]]) -> None:
        for name, answers in resolved.items():
            self.sites[name].assign([planned for planned, _ in answers], [call for _, call in answers])
        assert all(plan_key(c, a) == i for i, (c, a) in enumerate(KEYS))

    def _resolve(self, query: Query) -> tuple[Planned, Call]:
        reasons: list[str] = []
        station = query.operator in stations.STATIONS
        for entry in self._table.get(query.operator, ()):
            name = entry.name or f"{self.backend.name}.{query.operator}"
            refusals = entry.supports(query)
            if not refusals:
                kind: Kind = "fused" if station else "native"
                planned = Planned(
                    operator=query.operator, kind=kind, implementation=name, detail=entry.detail, reasons=tuple(reasons)
                )
                return planned, _native(name, query.operator, entry, self.backend.launcher)
            reasons += [f"{name}: {reason}" for reason in refusals]
        if query.operator not in self._table:
            reasons.append(f"backend {self.backend.name!r} has no {query.operator}")
        if station:
            return self._expand(query, reasons)
        return self._composite(query, reasons)

    def _expand(self, query: Query, reasons: list[str]) -> tuple[Planned, Call]:
        names = stations.parts_of(query.operator, query)
        resolved = {name: self._resolve(query.for_part(name)) for name in names}
        planned = Planned(
            operator=query.operator,
            kind="parts",
            implementation="parts",
            reasons=tuple(reasons),
            parts=tuple(part for part, _ in resolved.values()),
        )
        return planned, stations.build(query.operator, {name: call for name, (_, call) in resolved.items()})

    def _composite(self, query: Query, reasons: list[str]) -> tuple[Planned, Call]:
        fn = self._composites.get(query.operator)
        if fn is None:
            raise UnsupportedError(
                f"operator {query.operator!r} at site {query.site!r} is mandatory and backend {self.backend.name!r} "
                f"refuses it: " + "; ".join(reasons)
            )
        name = f"{COMPOSITE_PREFIX}{query.operator}"
        planned = Planned(operator=query.operator, kind="composite", implementation=name, reasons=tuple(reasons))
        return planned, fn

    def _enforce(self, resolved: Mapping[str, list[tuple[Planned, Call]]]) -> None:
        problems: dict[str, list[str]] = {}
        for site, answers in resolved.items():
            for (token_class, adapters), (planned, _) in zip(KEYS, answers, strict=True):
                for composite in planned.composites():
                    if OPERATORS[composite.operator].critical:
                        text = f"{composite.operator}: {'; '.join(composite.reasons)}"
                        where = f"{site} ({token_class.value}{' with adapters' if adapters else ''})"
                        problems.setdefault(text, []).append(where)
        if self.policy == "warn":
            # Extending the plan asks everything again; what has been said before is not said twice.
            problems = {text: where for text, where in problems.items() if text not in self._warned}
            self._warned |= dict.fromkeys(problems)
        if not problems or self.policy == "allow":
            return
        lines = [f"  {text}\n    at {_shorten(where)}" for text, where in problems.items()]
        message = f"backend {self.backend.name!r} runs critical operators as plain-torch composites:\n" + "\n".join(
            lines
        )
        if self.policy == "strict":
            raise UnsupportedError(message + '\nUse policy="warn" to run them anyway.')
        logger.warning(message)


def _shorten(where: list[str], most: int = 3) -> str:
    more = f" and {len(where) - most} more" if len(where) > most else ""
    return ", ".join(where[:most]) + more


def _choice(planned: Planned) -> list[object]:
    return [planned.operator, planned.kind, planned.implementation, planned.detail, [_choice(p) for p in planned.parts]]


def _native(name: str, operator: str, entry: Entry, launcher: Launcher) -> Call:
    fn, ledger, arguments = entry.fn, launcher.ledger, argument_names(operator)

    def native(*args: object, **kwargs: object) -> object:
        check_devices(operator, args, kwargs, arguments, launcher.rank)
        launched = ledger.launches
        ledger.enter(name)
        try:
            return fn(*args, **kwargs)
        except UNTYPED as error:
            raise typed(operator, error, args, kwargs, launcher.rank) from error
        finally:
            ledger.leave(name)
            if ledger.launches == launched:
                # A plain callable that knows nothing of the launcher still shows, under the name of its entry.
                ledger.record(name)

    return native


def with_static(request: SiteRequest, **static: Static) -> SiteRequest:
    """The same request with more exact dimensions."""
    return replace(request, static={**request.static, **static})
