"""What has been done so far, so that the whole can be done in parts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from polyaccel_conformance.certificate.sources import tree_digest
from tests.support.plugins import ROOT

SOURCES = (
    "polyaccel",
    "conformance/polyaccel_conformance",
    "tests/conftest.py",
    "tests/backend",
    "tests/backends",
    "tests/certify",
    "tests/conformance",
    "tests/models",
    "tests/project/source.py",
    "tests/support",
)
"""What stages run. Hours of them are not forgotten for a change to the tests of kernels."""
Verdict = Literal["passed", "failed", "partial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a stage came to. ``figures``: one line for the log; ``seconds``: of all its parts together."""

    verdict: Verdict
    figures: str = ""
    seconds: float = 0.0


def digest() -> str:
    """Of everything that decides what a stage finds."""
    return ":".join(tree_digest(ROOT / name) for name in SOURCES)


@dataclass(slots=True)
class State:
    """Outcomes by stage, and the fresh seeds, in a JSON file; what other sources came to is forgotten."""

    path: Path
    sources: str
    seeds: list[int] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> State:
        """The stored state if it is of today's sources, else an empty one."""
        sources = digest()
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["sources"] == sources:
                outcomes = {name: Outcome(**value) for name, value in stored["outcomes"].items()}
                return cls(path=path, sources=sources, seeds=stored["seeds"], outcomes=outcomes)
        return cls(path=path, sources=sources)

    def note(self, stage: str, outcome: Outcome) -> None:
        """Keep a stage's outcome; seconds are added to those of its earlier parts."""
        before = self.outcomes.get(stage)
        if before is not None and before.verdict == "partial":
            outcome = replace(outcome, seconds=outcome.seconds + before.seconds)
        self.outcomes[stage] = outcome
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        value = {
            "sources": self.sources,
            "seeds": self.seeds,
            "outcomes": {n: asdict(o) for n, o in self.outcomes.items()},
        }
        self.path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
