"""What runs and what ran: the answer of ``llm.explain()`` and ``llm.health()``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyaccel.backend.ledger import COMPOSITE_PREFIX, NESTED_PREFIX

if TYPE_CHECKING:
    from polyaccel.engine.executor import Executor
    from polyaccel.engine.loop import EngineLoop


class Explanation:
    """The dispatch plan and the kernel ledger of every rank.

    ``str()`` lists each site once per distinct answer; ``summary()`` is a few lines; ``to_dict()`` is everything.
    """

    def __init__(self, ranks: list[dict[str, object]]) -> None:
        self.ranks = ranks

    def to_dict(self) -> dict[str, object]:
        return {"ranks": self.ranks}

    @property
    def backend(self) -> str:
        return str(self._plan()["backend"])

    @property
    def ledger(self) -> dict[str, int]:
        """Launches by kernel name, summed over ranks."""
        total: Counter[str] = Counter()
        for rank in self.ranks:
            total.update(_mapping(rank["ledger"]))
        return dict(total)

    def composites(self) -> dict[str, list[str]]:
        """Reasons by operator for everything that is planned as a composite."""
        found: dict[str, list[str]] = {}
        for _, _, planned in self._answers():
            for part in _flatten(planned):
                if part["kind"] == "composite":
                    reasons = part["reasons"]
                    assert isinstance(reasons, list)
                    found.setdefault(str(part["operator"]), reasons)
        return found

    def summary(self) -> str:
        """Sites, how they are planned, composites with reasons, launches."""
        plan = self._plan()
        kinds: Counter[str] = Counter(str(planned["kind"]) for _, _, planned in self._answers())
        launches = self.ledger
        composite = sum(n for kernel, n in launches.items() if kernel.startswith((COMPOSITE_PREFIX, NESTED_PREFIX)))
        lines = [
            f"backend {self.backend}, {len(self.ranks)} rank(s), policy {plan['policy']}, plan "
            f"{str(plan['digest'])[:12]}",
            f"{len(_mapping(plan['sites']))} sites: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
            f"{sum(launches.values())} launches, {composite} of them composites",
        ]
        for operator, reasons in self.composites().items():
            lines.append(f"composite {operator}: {'; '.join(reasons)}")
        graphs = self.ranks[0].get("graphs")
        if isinstance(graphs, dict):
            lines.append(f"graphs: {graphs['captures']} captured, {graphs['replays']} replayed")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [self.summary(), ""]
        for site, answers in _mapping(self._plan()["sites"]).items():
            grouped: dict[str, list[str]] = {}
            for key, planned in _mapping(answers).items():
                grouped.setdefault(_text(_mapping(planned)), []).append(key)
            for text, keys in grouped.items():
                lines.append(f"{site} [{', '.join(keys)}]: {text}")
        lines.append("")
        lines += [f"{count:>10}  {kernel}" for kernel, count in sorted(self.ledger.items(), key=lambda item: -item[1])]
        return "\n".join(lines)

    def _plan(self) -> Mapping[str, object]:
        return _mapping(self.ranks[0]["plan"])

    def _answers(self) -> Iterator[tuple[str, str, Mapping[str, object]]]:
        for site, answers in _mapping(self._plan()["sites"]).items():
            for key, planned in _mapping(answers).items():
                yield site, key, _mapping(planned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether the engine serves, and how loaded it is.

    ``status``: "ok"; "degraded" when something runs that the plan does not show as native; "dead" with the reason.
    ``no_room``: steps so far for which the device had no memory, and which were done again as smaller ones.
    """

    status: Literal["ok", "degraded", "dead"]
    reason: str
    running: int
    waiting: int
    free_kv_blocks: int
    kv_blocks: int
    no_room: int = 0

    @classmethod
    def of(cls, loop: EngineLoop, executor: Executor) -> Health:
        dead = loop.dead
        blocks = executor.capacity.kv_blocks
        if dead is not None:
            return cls(status="dead", reason=str(dead), running=0, waiting=0, free_kv_blocks=0, kv_blocks=blocks)
        ranks, stats = loop.call(executor.explain), loop.stats()
        nested = [k for k in Explanation(ranks).ledger if k.startswith(NESTED_PREFIX)]
        reason = f"composites run inside native implementations: {nested}" if nested else ""
        return cls(
            status="degraded" if nested else "ok",
            reason=reason,
            running=stats.running,
            waiting=stats.waiting,
            free_kv_blocks=stats.kv_blocks - stats.kv_blocks_used,
            kv_blocks=blocks,
            no_room=stats.no_room,
        )


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value


def _flatten(planned: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    yield planned
    parts = planned["parts"]
    assert isinstance(parts, list)
    for part in parts:
        yield from _flatten(part)


def _text(planned: Mapping[str, object]) -> str:
    parts = planned["parts"]
    assert isinstance(parts, list)
    body = " + ".join(_text(part) for part in parts) if parts else str(planned["implementation"])
    detail = f" ({planned['detail']})" if planned["detail"] else ""
    reasons = planned["reasons"]
    assert isinstance(reasons, list)
    why = f"  <- {'; '.join(map(str, reasons))}" if planned["kind"] == "composite" and reasons else ""
    return f"{body}{detail}{why}"
