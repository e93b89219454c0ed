"""Checking a bundle again: hashes, every figure from its log, every input from its seed, and whether it is stale."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis

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
from polyaccel_conformance.certificate.condense import of_inputs
from polyaccel_conformance.certificate.environment import SOURCES, sources
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.certificate.rerun import Rerun
from polyaccel_conformance.certificate.rerun import rerun as execute_again
from polyaccel_conformance.certificate.signature import is_signed_by, read_public_key
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.log import Logged, parse_log
from polyaccel_conformance.problem import Problem, ProblemSet
from polyaccel_conformance.profiles import profile_of
from polyaccel_conformance.schedule import drawn, fixed
from polyaccel_conformance.waivers import Waiver

JUDGES = frozenset(("source.contract", "source.suite"))
"""Sources that decide what follows from a log: where one has changed, a summary may rightly differ."""
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
    if not isinstance(stated, dict):
        raise UsageError(f"{bundle.path}: {SUMMARY} is not an object")
    logged = parse_log(bundle.files[LOG], f"{bundle.path}: {LOG}")
    waivers = _waivers(bundle)
    changed = dict(_changed(logged))
    stale = list(changed.values())
    results = [result for _, result in logged.results]
    problems += _limited("the summary", list(_counts(stated, results)))
    differences = list(_summary(bundle, stated, logged, waivers))
    if differences and changed.keys() & JUDGES:
        notes.append(f"today's suite and contract make something else of the log: {len(differences)} differences")
    else:
        problems += _limited("the summary", differences)
    regenerated, wrong = _regenerate(results)
    if stale and wrong:
        # Inputs may rightly differ once the generators have changed; that is what stale means.
        notes.append(f"{len(wrong)} cases have other inputs now")
    else:
        problems += _limited("the inputs", wrong)
    if not stale:
        problems += _limited("the list of cases", list(_missing(logged, notes)))
    ended = [waiver.test for waiver in waivers if waiver.expires < (today or datetime.date.today())]
    notes += [f"waiver {test} has expired since" for test in ended]
    done = 0
    if rerun:
        again_here = _rerun(logged, results, rerun)
        done = again_here.done
        notes += _limited("executing again", again_here.left)
        if again_here.other_bits:
            notes.append(f"{again_here.other_bits} of {done} cases gave other bits, within the bound")
        # Other source may rightly give another verdict.
        (notes if stale else problems).extend(_limited("executing again", again_here.differences))
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


def _counts(stated: Mapping[str, Any], results: Sequence[CaseResult]) -> Iterator[str]:
    """Figures that follow from the log whatever the suite makes of it: cases and failures by operator."""
    ran = Counter(result.case.operator for result in results)
    wrong = Counter(result.case.operator for result in results if result.wrong)
    try:
        said = {state["operator"]: (state["cases"], state["failed"]) for state in stated["result"]["operators"]}
    except (KeyError, TypeError) as error:
        yield f"it states no cases by operator ({type(error).__name__})"
        return
    for name in sorted({*ran, *said}):
        cases, failed = said.get(name, (0, 0))
        if (cases, failed) != (ran[name], wrong[name]):
            yield f"{name} says {cases} cases, {failed} failed; the log has {ran[name]}, {wrong[name]}"


def _summary(bundle: Bundle, stated: Mapping[str, Any], logged: Logged, waivers: Sequence[Waiver]) -> Iterator[str]:
    """Where the summary and the page differ from what the log leads to."""
    require_native = bool(stated.get("require_native", False))
    try:
        report = recount(logged, waivers, require_native=require_native)
        again = {**summary(report), "require_native": require_native}
        page = render(report).encode()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        yield f"the log holds what no run writes: {type(error).__name__}: {error}"
        return
    yield from _differences(stated, json.loads(json.dumps(again)))
    if bundle.files[PAGE] != page:
        yield f"{PAGE} is not what the log leads to: it was edited by hand"


def _changed(logged: Logged) -> Iterator[tuple[str, str]]:
    """Which sources are no longer the ones that were tested, by their key, each with a sentence."""
    here = _sources(logged)
    names = {
        "source.backend": "the backend's source",
        "source.contract": "the contract",
        "source.core": "the core that backends run on",
        "source.suite": "the suite",
    }
    for key in SOURCES:
        then = logged.header.environment.get(key)
        if then is None:
            yield key, f"it does not say which version of {names[key]} was tested"
        elif isinstance(here, str):
            yield key, f"{names[key]} cannot be compared: {here}"
            return
        elif here[key] != then:
            yield key, f"{names[key]} has changed"


def _sources(logged: Logged) -> dict[str, str] | str:
    try:
        return sources(logged.header.subject.open())
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
            digests = _digests(problems.problem(case))
        except Exception as error:
            wrong.append(f"case {case.key} of {case.operator} cannot be drawn: {type(error).__name__}: {error}")
            continue
        count += 1
        if of_inputs(digests) != of_inputs(result.digests):
            wrong.append(f"case {case.key} of {case.operator} has other inputs than those on record")
    return count, wrong


def _digests(problem: Problem) -> dict[str, str]:
    from polyaccel_conformance.multi.problem import RankedProblem, digests_of_ranks

    if isinstance(problem, RankedProblem) and problem.case.ranks > 1:
        return digests_of_ranks(problem)
    return problem.digests()


def _missing(logged: Logged, notes: list[str]) -> Iterator[str]:
    """Cases of the run that the log lacks: of the fixed list, and of those drawn under the run's seed."""
    header = logged.header
    if not header.complete or not logged.ended:
        return
    have = {result.case.key for _, result in logged.results}
    then, here = header.environment.get("hypothesis", ""), hypothesis.__version__
    redraw = then == here
    if not redraw:
        notes.append(f"drawn cases were not drawn again: Hypothesis was {then or 'unknown'}, it is {here} here")
    profile = profile_of(header.profile)
    for ranks in range(1, header.devices + 1):
        for name, problems in problem_sets(ranks).items():
            if name not in header.operators:
                continue
            items = fixed(problems, ranks=ranks)
            items += drawn(problems, profile, header.seed, ranks=ranks) if redraw else ()
            for item in items:
                if item.case.key not in have:
                    yield f"{item.phase} case {item.case.key} of {name} is not in the log"


def _rerun(logged: Logged, results: Sequence[CaseResult], count: int) -> Rerun:
    try:
        return execute_again(logged, results, count)
    except PolyaccelError as error:
        raise UsageError(f"--rerun needs the backend: {error}") from error
