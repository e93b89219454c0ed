"""The page on mutants: what kills each, what every check alone kills, and what is not as it must be."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.mutants.records import Record, Records
from polyaccel_conformance.mutants.score import NARROW

SEEDS = 3
LEAST_NARROW = 15

INTRODUCTION = """# Mutants

A suite that finds nothing may be blind. So it carries backends and engines with one planted bug each: *mutants*. A
mutant keeps its host's name, plan and declarations, unless these are the bug. It runs through the same runner as any
backend, in processes of its own; no check knows that it is one. The check that is there for its bug must find it.

```sh
polyaccel conformance mutants                          # every mutant, until its check has found it
polyaccel conformance mutants sgmv.rank_one            # one of them
polyaccel conformance mutants --matrix docs/mutants.md # all checks on all cases: this page
polyaccel conformance mutants --seeds 3                # drawn cases alone, three fresh seeds
polyaccel conformance mutants --by-date 3              # three of them, and the whole of quick
polyaccel conformance mutants --backend NAME           # planted around the operators of another backend
```

A run of a mutant executes the quick list of the operators and questions that it changes and ends at the first failure
of its check. `run --profile certify` plants ten around the operators of the backend that is certified and states what
became of them.

This page is written by the command. Results are kept in the JSON file beside it; mutants without one are run, and those
that are named are run again. The command fails if a mutant survives, if healthy code is killed, if a check is the only
killer of no mutant, or if a bug that is called narrow is not.
"""


def sole_killers(records: Mapping[str, Record]) -> dict[str, list[str]]:
    """By check, the mutants that survive when this check is switched off, and only then."""
    found: dict[str, list[str]] = {}
    for name, record in records.items():
        if record.full is not None and len(record.full.kills) == 1:
            found.setdefault(next(iter(record.full.kills)), []).append(name)
    return found


def problems(
    mutants: Mapping[str, Mutant], records: Records, checks: Sequence[str], hosts: Iterable[str] = ()
) -> list[str]:
    """What is not as it must be, a sentence each."""
    found: list[str] = []
    known = {name: records.of(mutant) for name, mutant in mutants.items()}
    for name, mutant in mutants.items():
        full = known[name].full
        if full is None:
            found.append(f"{name} was not run")
        elif mutant.check not in full.kills:
            found.append(f"{name} survives {mutant.check}")
        drawn = known[name].uniform
        if mutant.narrow and drawn is None:
            found.append(f"{name} is called narrow, but no uniformly drawn case was run")
        elif mutant.narrow and drawn is not None and drawn.share >= NARROW:
            found.append(f"{name} is called narrow, but {drawn.share:.1%} of uniformly drawn cases fail")
    for name, score in records.hosts.items():
        if score.kills:
            found.append(f"healthy code ({name}) is killed by {', '.join(score.kills)}")
    found += [f"healthy code ({name}) was not run" for name in hosts if name not in records.hosts]
    narrow = sum(mutant.narrow for mutant in mutants.values())
    if narrow < LEAST_NARROW:
        found.append(f"{narrow} mutants are narrow, at least {LEAST_NARROW} must be")
    sole = sole_killers(known)
    found += [f"{check} is the only killer of no mutant" for check in checks if check not in sole]
    return found


def page(mutants: Mapping[str, Mutant], records: Records, checks: Sequence[str], hosts: Iterable[str] = ()) -> str:
    """The page as Markdown."""
    known = {name: records.of(mutant) for name, mutant in mutants.items()}
    parts = [
        INTRODUCTION,
        _figures(mutants, known),
        _listed(mutants, known),
        _narrow(mutants, known),
        _sole(known, checks),
        _seeds(known),
        _matrix(known, records, checks),
        _open(problems(mutants, records, checks, hosts)),
    ]
    return "\n".join(part for part in parts if part)


def _figures(mutants: Mapping[str, Mutant], known: Mapping[str, Record]) -> str:
    hunts = {name: record.hunt for name, record in known.items() if record.hunt is not None}
    if not hunts:
        return ""
    single = [s.seconds for n, s in hunts.items() if mutants[n].devices == 1]
    several = [s.seconds for n, s in hunts.items() if mutants[n].devices > 1]
    found = sum(mutants[name].check in score.kills for name, score in hunts.items())
    rows = {"mutants": f"{len(mutants)}", "found by the check that is there for them": f"{found}"}
    if single:
        rows["median of a run, one rank"] = f"{statistics.median(single):.1f} s"
    if several:
        rows["longest run, several ranks"] = f"{max(several):.1f} s"
    rows["all runs, one after the other"] = f"{sum(score.seconds for score in hunts.values()):.0f} s"
    return (
        "\n".join(["## Figures", "", "| what | figure |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
        + "\n"
    )


def _listed(mutants: Mapping[str, Mutant], known: Mapping[str, Record]) -> str:
    lines = [
        "## What kills each",
        "",
        "*Failing*: the share of the quick list's cases that fail some check. Numbers in brackets are failing cases.",
        "",
        "| mutant | bug | host | failing | killed by |",
        "|---|---|---|---|---|",
    ]
    for name, mutant in mutants.items():
        record = known[name]
        if record.full is None:
            continue
        kills = sorted(record.full.kills.items(), key=lambda item: (item[0] != mutant.check, -item[1]))
        shown = ", ".join(f"`{check}` ({count})" for check, count in kills) or "nothing"
        host = mutant.host if mutant.devices == 1 else f"{mutant.host}, {mutant.devices} ranks"
        lines.append(f"| `{name}` | {mutant.what} | {host} | {record.full.share:.1%} | {shown} |")
    return "\n".join(lines) + "\n"


def _narrow(mutants: Mapping[str, Mutant], known: Mapping[str, Record]) -> str:
    lines = [
        "## Narrow bugs",
        "",
        f"They show in less than {NARROW:.0%} of uniformly drawn cases. What finds them all the same is the covering "
        "list, and drawn sizes next to multiples of 16.",
        "",
        "| mutant | bug | uniform cases that fail |",
        "|---|---|---|",
    ]
    for name, mutant in mutants.items():
        score = known[name].uniform
        if mutant.narrow and score is not None:
            lines.append(f"| `{name}` | {mutant.what} | {score.failing} of {score.cases} ({score.share:.1%}) |")
    return "\n".join(lines) + "\n"


def _sole(known: Mapping[str, Record], checks: Sequence[str]) -> str:
    sole = sole_killers(known)
    lines = [
        "## Every check switched off in turn",
        "",
        "Without this check, these mutants would survive:",
        "",
        "| check | survivors without it |",
        "|---|---|",
    ]
    for check in checks:
        lines.append(f"| `{check}` | {', '.join(f'`{name}`' for name in sole.get(check, [])) or '**none**'} |")
    return "\n".join(lines) + "\n"


def _seeds(known: Mapping[str, Record]) -> str:
    seeds = sorted({seed for record in known.values() for seed in record.seeds}, key=int)
    if not seeds:
        return ""
    lines = [
        "## Drawn cases alone",
        "",
        "The fixed list switched off, profile `default`, fresh seeds. A number is how many cases ran until the check "
        "had found the mutant.",
        "",
        "| mutant |" + "".join(f" seed {seed} |" for seed in seeds),
        "|---|" + "---|" * len(seeds),
    ]
    for name, record in known.items():
        if record.seeds:
            cells = [record.seeds.get(seed) for seed in seeds]
            shown = [" |" if s is None else f" {s.cases} |" if s.kills else " **survived** |" for s in cells]
            lines.append(f"| `{name}` |" + "".join(shown))
    caught = [
        sum(bool(record.seeds[seed].kills) for record in known.values() if seed in record.seeds) for seed in seeds
    ]
    ran = [sum(seed in record.seeds for record in known.values()) for seed in seeds]
    lines.append("| **found** |" + "".join(f" {c} of {n} |" for c, n in zip(caught, ran, strict=True)))
    return "\n".join(lines) + "\n"


def _matrix(known: Mapping[str, Record], records: Records, checks: Sequence[str]) -> str:
    numbers = {check: number for number, check in enumerate(checks, 1)}
    others = sorted(
        {check for record in known.values() if record.full for check in record.full.kills if check not in numbers}
    )
    numbers |= {check: len(numbers) + place for place, check in enumerate(others, 1)}
    lines = [
        "## Kill matrix",
        "",
        "Failing cases of the quick list by mutant and check. A dot: the check was asked and passed.",
        "",
        ", ".join(f"{number} `{check}`" for check, number in numbers.items()),
        "",
        "| mutant |" + "".join(f" {number} |" for number in numbers.values()),
        "|---|" + "---|" * len(numbers),
    ]
    rows = {f"*{name}*": score for name, score in records.hosts.items()}
    rows |= {f"`{name}`": record.full for name, record in known.items() if record.full is not None}
    for name, score in rows.items():
        cells = [str(score.kills[c]) if c in score.kills else "." if c in score.asked else "" for c in numbers]
        lines.append(f"| {name} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines) + "\n"


def _open(found: Sequence[str]) -> str:
    if not found:
        return ""
    return "\n".join(["## Not as it must be", "", *(f"- {one}" for one in found)]) + "\n"
