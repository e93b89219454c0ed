"""Checking a bundle again: hashes, every figure from its log, every input from its seed, and whether it is stale."""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyaccel.backend import PolyaccelError
from polyaccel_conformance.certificate.bundle import (
    LOG,
    MANIFEST,
    PAGE,
    SIGNATURE,
    SUMMARY,
    WAIVERS,
    Bundle,
    manifest,
    render,
    summary,
)
from polyaccel_conformance.certificate.environment import SOURCES, environment
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.certificate.signature import is_signed_by, read_public_key
from polyaccel_conformance.check import CaseResult, run_case
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.log import Logged, read_log
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.schedule import OfRanks, fixed
from polyaccel_conformance.waivers import Waiver

MOST = 12
"""Differences of one kind that are listed; the rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        problems: why the bundle is not what it says, most telling first.
        stale: what has changed since, in words; the bundle was right when it was written.
        notes: what could not be looked at, and what is worth knowing.
        cases: how many cases the log has; ``regenerated``: whose inputs were drawn again and compared; ``rerun``: how
            many were executed again.
        title: the bundle's own first line.
    """

    title: str
    kind: str
    problems: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cases: int = 0
    regenerated: int = 0
    rerun: int = 0

    @property
    def verdict(self) -> str:
        return "INVALID" if self.problems else "STALE" if self.stale else "VALID"

    @property
    def exit_code(self) -> ExitCode:
        return {"INVALID": ExitCode.FAIL, "STALE": ExitCode.INCONCLUSIVE, "VALID": ExitCode.PASS}[self.verdict]

    def text(self) -> str:
        lines = [f"{self.title} ({self.kind})"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  stale: {reason}" for reason in self.stale]
        lines += [f"  note: {note}" for note in self.notes]
        counts = f"{self.cases} cases, {self.regenerated} regenerated, {self.rerun} executed again"
        return "\n".join([*lines, f"{self.verdict}: {counts}", ""])


def verify(
    bundle: Bundle, *, rerun: int = 0, key: Path | None = None, today: datetime.date | None = None
) -> Verification:
    """Check everything that can be checked on this machine.

    Args:
        rerun: cases to execute again, chosen evenly over the operators.
        key: the public key that must have signed it.
        today: for the waivers' end; by default they are judged as on the day of the run, and a waiver that has ended
            since is a note.

    Raises:
        UsageError: a file of the bundle cannot be read at all, or the key.
    """
    problems = list(_hashes(bundle))
    notes: list[str] = []
    problems += _signature(bundle, key, notes)
    stated = bundle.json(SUMMARY)
    logged = _log(bundle)
    waivers = _waivers(bundle)
    report = recount(logged, waivers, require_native=bool(stated.get("require_native", False)))
    again = {**summary(report), "require_native": bool(stated.get("require_native", False))}
    problems += _limited("the summary", list(_differences(stated, json.loads(json.dumps(again)))))
    if bundle.files[PAGE] != render(report).encode():
        problems.append(f"{PAGE} is not what the log leads to: it was edited by hand")
    stale = list(_stale(logged))
    results = [result for _, result in logged.results]
    regenerated, wrong = _regenerate(results)
    if stale and wrong:
        # Inputs may rightly differ once the generators have changed; that is what stale means.
        notes.append(f"{len(wrong)} cases have other inputs now")
    else:
        problems += _limited("the inputs", wrong)
    if not stale:
        problems += _limited("the fixed list", list(_missing(logged)))
    ended = [waiver.test for waiver in waivers if waiver.expires < (today or datetime.date.today())]
    notes += [f"waiver {test} has expired since" for test in ended]
    done = 0
    if rerun:
        done, differences = _rerun(logged, results, rerun, notes)
        # Other source may rightly give another verdict.
        (notes if stale else problems).extend(_limited("executing again", differences))
    return Verification(
        title=str(stated.get("title", "no title")) + ": " + str(stated.get("verdict", "")),
        kind=str(stated.get("kind", "unknown")),
        problems=tuple(problems),
        stale=tuple(stale),
        notes=tuple(notes),
        cases=len(results),
        regenerated=regenerated,
        rerun=done,
    )


def _hashes(bundle: Bundle) -> Iterator[str]:
    stated = bundle.json(MANIFEST)
    if not isinstance(stated, Mapping):
        yield f"{MANIFEST} is no table of hashes"
        return
    files = {name: data for name, data in bundle.files.items() if name not in (MANIFEST, SIGNATURE)}
    for name, data in sorted(files.items()):
        if stated.get(name) != hashlib.sha256(data).hexdigest():
            yield f"{name} does not match its hash: it was edited by hand"
    if bundle.files[MANIFEST] != manifest(files) and set(stated) != set(files):
        yield f"{MANIFEST} names {sorted(stated)}, the bundle holds {sorted(files)}"


def _signature(bundle: Bundle, key: Path | None, notes: list[str]) -> Iterator[str]:
    if key is None:
        if SIGNATURE in bundle.files:
            notes.append("it is signed; name the public key to check by whom")
        return
    public = read_public_key(key)
    if SIGNATURE not in bundle.files:
        yield "it has no signature"
    elif not is_signed_by(public, bundle.files[MANIFEST], bundle.json(SIGNATURE)):
        yield f"the signature is not by the holder of {key}"


def _log(bundle: Bundle) -> Logged:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / LOG
        path.write_bytes(bundle.files[LOG])
        try:
            return read_log(path)
        except UsageError as error:
            raise UsageError(f"{bundle.path}: {str(error).replace(str(path), LOG)}") from error


def _waivers(bundle: Bundle) -> tuple[Waiver, ...]:
    try:
        return tuple(
            Waiver(
                test=item["test"],
                reason=item["reason"],
                url=item["url"],
                expires=datetime.date.fromisoformat(item["expires"]),
            )
            for item in bundle.json(WAIVERS)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{bundle.path}: {WAIVERS} is not a list of waivers: {error}") from error


def _differences(stated: Any, found: Any, where: str = "") -> Iterator[str]:
    """Places where two JSON values differ, in words."""
    if isinstance(stated, dict) and isinstance(found, dict):
        for name in sorted(stated.keys() | found.keys()):
            here = f"{where}.{name}" if where else name
            if name not in found:
                yield f"{here} is stated, the log gives none"
            elif name not in stated:
                yield f"{here} is missing, the log gives {_short(found[name])}"
            else:
                yield from _differences(stated[name], found[name], here)
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for i, (one, other) in enumerate(zip(stated, found, strict=True)):
            yield from _differences(one, other, f"{where}[{i}]")
    elif stated != found:
        yield f"{where} says {_short(stated)}, the log gives {_short(found)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _limited(what: str, found: Sequence[str]) -> list[str]:
    lines = [f"{what}: {line}" for line in found[:MOST]]
    return [*lines, f"{what}: and {len(found) - MOST} more"] if len(found) > MOST else lines


def _stale(logged: Logged) -> Iterator[str]:
    """Which sources are no longer the ones that were tested."""
    here = _environment(logged)
    names = {
        "source.backend": "the backend's source",
        "source.contract": "the contract",
        "source.core": "the core that backends run on",
        "source.suite": "the suite",
    }
    for key in SOURCES:
        then = logged.header.environment.get(key)
        if then is None:
            yield f"it does not say which version of {names[key]} was tested"
        elif isinstance(here, str):
            yield f"{names[key]} cannot be compared: {here}"
            return
        elif here[key] != then:
            yield f"{names[key]} has changed"


def _environment(logged: Logged) -> dict[str, str] | str:
    try:
        backend = logged.header.subject.open()
        return environment(logged.header.subject.name, backend)
    except PolyaccelError as error:
        return str(error)


def problem_sets(case_ranks: int) -> Mapping[str, ProblemSet]:
    """The registry that a case of this world size comes from."""
    if case_ranks > 1:
        from polyaccel_conformance.multi.registry import RANKED_SETS

        return RANKED_SETS
    from polyaccel_conformance.problems.registry import PROBLEM_SETS

    return PROBLEM_SETS


def _regenerate(results: Sequence[CaseResult]) -> tuple[int, list[str]]:
    """Draw every case's inputs again and compare their hashes."""
    count = 0
    wrong: list[str] = []
    for result in results:
        case = result.case
        problems = problem_sets(case.ranks).get(case.operator)
        if problems is None:
            wrong.append(f"case {case.key}: operator {case.operator} has no cases here")
            continue
        if not result.checks and not result.passed:
            # It cost its worker: nothing but the failure is on record.
            continue
        try:
            digests = problems.problem(case).digests()
        except Exception as error:
            wrong.append(f"case {case.key} of {case.operator} cannot be drawn: {type(error).__name__}: {error}")
            continue
        count += 1
        if dict(digests) != dict(result.digests):
            wrong.append(f"case {case.key} of {case.operator} has other inputs than those on record")
    return count, wrong


def _missing(logged: Logged) -> Iterator[str]:
    """Cases of the fixed list that the log lacks."""
    if not logged.header.complete or not logged.ended:
        return
    have = {result.case.key for _, result in logged.results}
    for ranks in range(1, logged.header.devices + 1):
        for name, problems in problem_sets(ranks).items():
            if name not in logged.header.operators:
                continue
            source = problems if ranks == 1 else OfRanks(problems, ranks)
            for item in fixed(source, ranks=ranks):
                if item.case.key not in have:
                    yield f"case {item.case.key} of {name} is not in the log"


def sample(results: Sequence[CaseResult], count: int) -> list[CaseResult]:
    """``count`` cases of one rank, as evenly over the operators as they allow; always the same ones for a log."""
    queues: dict[str, list[CaseResult]] = {}
    for result in sorted(results, key=lambda r: hashlib.sha256(r.case.key.encode()).digest()):
        if result.case.ranks == 1:
            queues.setdefault(result.case.operator, []).append(result)
    chosen: list[CaseResult] = []
    while queues and len(chosen) < count:
        for name in sorted(queues):
            if len(chosen) < count:
                chosen.append(queues[name].pop())
            if not queues[name]:
                del queues[name]
    return chosen


def _rerun(logged: Logged, results: Sequence[CaseResult], count: int, notes: list[str]) -> tuple[int, list[str]]:
    from polyaccel_conformance.checks.registry import CHECKS
    from polyaccel_conformance.workers.worker import open_bench

    try:
        bench, _ = open_bench(logged.header.subject, 0)
    except PolyaccelError as error:
        raise UsageError(f"--rerun needs the backend: {error}") from error
    chosen = sample(results, count)
    if len(chosen) < count:
        notes.append(f"only {len(chosen)} cases run on one rank")
    wrong: list[str] = []
    other_bits = 0
    for result in chosen:
        checks = [CHECKS[name] for name in result.checks if name in CHECKS]
        problem = problem_sets(1)[result.case.operator].problem(result.case)
        again = run_case(bench, problem, checks)
        if again.passed != result.passed:
            said = {True: "passed", False: "failed"}
            case = f"case {result.case.key} of {result.case.operator}"
            wrong.append(f"{case} {said[again.passed]}, it {said[result.passed]} before")
        elif again.observed != result.observed:
            other_bits += 1
    bench.backend.close()
    if other_bits:
        notes.append(f"{other_bits} of {len(chosen)} cases gave other bits, within the bound")
    return len(chosen), wrong
