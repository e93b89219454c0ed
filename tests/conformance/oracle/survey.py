"""Measures how sound and how tight the oracle's bounds are, and writes the tables of docs/oracle.md.

    python -m tests.conformance.oracle.survey measure [OPERATOR ...] [--cases N]
    python -m tests.conformance.oracle.survey write

``measure`` leaves one file an operator in ``figures``; ``write`` makes the tables of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyaccel.backend import TableBackend
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.harness.probes import Measured
from polyaccel_conformance.probes.planted import LENGTH
from polyaccel_conformance.probes.registry import PROBES
from tests.conformance.drawn import remembered
from tests.conformance.oracle.subjects import SUBJECTS, Subject

Figures = Mapping[str, Any]

FIGURES = Path(__file__).with_name("figures")
PAGE = Path(__file__).parents[3] / "docs" / "oracle.md"
CASES = 10_000
EACH = 4
"""Implementations that compute a case, in turn."""
SEED = 4_000_000
RANDOM = 40
"""Cases of random data, of each dtype, on which the bound is compared with healthy implementations."""


def soundness(subject: Subject, cases: int, seed: int = SEED) -> dict[str, dict[str, float]]:
    """By implementation, its cases, how many were over the bound, and its worst err / tol."""
    found = {name: {"cases": 0, "over": 0, "worst": 0.0} for name in subject.legitimate}
    turn = itertools.cycle(subject.legitimate.items())
    with np.errstate(all="ignore"):
        for problem in map(remembered, subject.drawn(cases, seed)):
            for name, emulate in itertools.islice(turn, min(EACH, len(found))):
                ratio = subject.ratio(problem, emulate)
                row = found[name]
                row["cases"] += 1
                row["over"] += ratio > 1
                row["worst"] = max(row["worst"], ratio)
    return found


def tightness(subject: Subject, seed: int = SEED) -> dict[str, dict[str, Any]]:
    """By dtype, the worst healthy err / tol on random data, and for each lower implementation that of tier 2 and
    whether tier 1 finds it."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in FORMATS:
        lower = {
            name: {
                "tier 2": subject.bounded(dtype, name, seed),
                "tier 1": subject.discovered(dtype, name, seed),
            }
            for name in subject.lower[dtype]
        }
        found[dtype] = {"healthy": subject.healthy(dtype, RANDOM, seed), "lower": lower}
    return found


def measure(operators: Iterable[str], cases: int) -> None:
    """Write the figures of these operators."""
    FIGURES.mkdir(exist_ok=True)
    for operator in operators:
        subject = SUBJECTS[operator]
        figures = {
            "operator": operator,
            "cases": cases,
            "seed": SEED,
            "soundness": soundness(subject, cases),
            "tightness": tightness(subject),
        }
        text = json.dumps(figures, indent=1, default=float) + "\n"
        (FIGURES / f"{operator}.json").write_text(text.replace("Infinity", '"infinite"'))
        print(operator, max(row["worst"] for row in figures["soundness"].values()), flush=True)  # type: ignore[attr-defined]


def stored() -> dict[str, Figures]:
    """The figures by operator, in the order of the subjects."""
    paths = {operator: FIGURES / f"{operator}.json" for operator in SUBJECTS}
    return {operator: json.loads(path.read_text()) for operator, path in paths.items() if path.exists()}


# -- tables ------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def ratio(value: float | str) -> str:
    """Three digits, or what is wrong whatever the tolerance."""
    if isinstance(value, str):
        return "wrong number"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def summary(figures: Mapping[str, Figures]) -> Iterator[str]:
    head = ("operator", "cases", "implementations", "over", "worst err / tol")
    return table(
        head,
        (
            (
                f"`{operator}`",
                f"{found['cases']:,}",
                str(len(found["soundness"])),
                str(sum(row["over"] for row in found["soundness"].values())),
                ratio(max(row["worst"] for row in found["soundness"].values())),
            )
            for operator, found in figures.items()
        ),
    )


def implementations(figures: Mapping[str, Figures]) -> Iterator[str]:
    head = ("operator", "cases of each", "implementations and their worst err / tol")
    return table(
        head,
        (
            (
                f"`{operator}`",
                f"{min(row['cases'] for row in found['soundness'].values()):,}",
                "; ".join(f"{name} {ratio(row['worst'])}" for name, row in found["soundness"].items()),
            )
            for operator, found in figures.items()
        ),
    )


def lower(figures: Mapping[str, Figures]) -> Iterator[str]:
    head = ("operator", "dtype", "healthy", "one class lower")
    return table(
        head,
        (
            (
                f"`{operator}`",
                dtype,
                ratio(of_dtype["healthy"]),
                "; ".join(
                    f"{name} {ratio(tiers['tier 2'])} ({finder(tiers)})" for name, tiers in of_dtype["lower"].items()
                ),
            )
            for operator, found in figures.items()
            for dtype, of_dtype in found["tightness"].items()
        ),
    )


def finder(tiers: Mapping[str, Any]) -> str:
    """The tiers that find a lower implementation."""
    bounded = isinstance(tiers["tier 2"], str) or tiers["tier 2"] > 1
    names = [name for name, hit in (("1", tiers["tier 1"]), ("2", bounded)) if hit]
    return ", ".join(names) or "3"


def probes(figures: Mapping[str, Figures]) -> Iterator[str]:
    """How far each probe of one rank reaches, as the composites show."""
    found = {
        (operator, dtype): probe(Bench(TableBackend("cpu", {})), dtype, LENGTH)
        for operator, probe in PROBES.items()
        for dtype in FORMATS
    }
    rows: dict[tuple[str, ...], list[str]] = {}
    for operator in PROBES:
        # 16-bit results show less: their probes are the first ones of float32.
        for place, first in enumerate(found[operator, "float32"]):
            shown = [found[operator, dtype][place : place + 1] for dtype in FORMATS]
            cells = ("".join(map(bits, one)) for one in shown)
            rows.setdefault((f"`{operator}`", *cells), []).append(first.name)
    lines = ((operator, ", ".join(names), *cells) for (operator, *cells), names in rows.items())
    return table(("operator", "of", *FORMATS), lines)


def bits(found: Measured) -> str:
    """In few words."""
    parts = [] if found.input_bits is None else [f"input {found.input_bits}"]
    return ", ".join([*parts, *([] if found.bits is None else [f"{found.quantity} {found.bits}"])])


TABLES = {"summary": summary, "implementations": implementations, "lower": lower, "probes": probes}


def rendered(page: str, figures: Mapping[str, Figures]) -> str:
    """The page with its tables made anew, each between its two marks."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = before + begin + "\n" + "\n".join(make(figures)) + "\n\n" + end + after
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "write"))
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="all by default")
    parser.add_argument("--cases", type=int, default=CASES)
    chosen = parser.parse_args(arguments)
    if chosen.command == "measure":
        measure(chosen.operators or SUBJECTS, chosen.cases)
    else:
        PAGE.write_text(rendered(PAGE.read_text(), stored()))


if __name__ == "__main__":
    main()
