"""A run: all scheduled cases on a subject, every check's control, minimal cases of what failed, one result."""

from __future__ import annotations

import datetime
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyaccel.backend.version import API_VERSION, format_version
from polyaccel_conformance import SUITE_REVISION
from polyaccel_conformance.case import Case
from polyaccel_conformance.casefile import CaseFile, spec_revision
from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.grouping import Key, failure_groups, key_of
from polyaccel_conformance.log import ResultsLog, read_log
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.profiles import Profile, profile_of
from polyaccel_conformance.promises import Rule, judged
from polyaccel_conformance.ranked import MAX_HANGS, RankedCases
from polyaccel_conformance.results import FailureGroup, Phase, RunHeader, RunResult, result_from_json
from polyaccel_conformance.run_options import Options, Silent, Watch
from polyaccel_conformance.schedule import HEAVY, Schedule, Scheduled, ahead, begin_lists
from polyaccel_conformance.selection import parse
from polyaccel_conformance.shrink import cost, shrink
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.tally import Tally
from polyaccel_conformance.workers.measuring import SharedProbes
from polyaccel_conformance.workers.pool import HANG, Answer, Job, Pool, WorkerLost
from polyaccel_conformance.workers.process import ForkServer

__all__ = ["CASES", "RESULTS", "WORKER", "Options", "Silent", "Watch", "lost_result", "run"]

WORKER = "worker"
"""Under this name failures are reported that are no check's: the process died or hung, or the suite itself failed."""
CONTROL_SECONDS = 120.0
POSSIBLE = "possible"
"""What is said of a check that no case asks although the device could be asked it."""
HEAVY_PATIENCE = 4
"""A case of a heavy set may take so many times as long as any other."""
MAX_DEATHS = 12
"""Cases of one operator that may cost a worker before its remaining cases are left out."""
SHRINK_TOTAL = 180.0
"""Seconds that all minimal cases of a run may take together."""
RESULTS = "results.jsonl"
CASES = "cases"
DEFAULTS = Options()


def run(
    subject: Subject,
    options: Options = DEFAULTS,
    watch: Watch | None = None,
    server: ForkServer | None = None,
) -> RunResult:
    """Run everything that the options ask for.

    Args:
        server: a forkserver to share with other runs; it stays open.

    Raises:
        UsageError: an unknown name, a subject that cannot be opened, more devices than there are, nothing selected.
    """
    with Pool(subject, count=options.workers, device=options.device, server=server) as pool:
        return _Run(subject, options, watch if watch is not None else Silent(), pool).run()


@dataclass(slots=True)
class _Group:
    """Failures of one operator, check and cause as they come in; those of what was never promised apart."""

    simplest: CaseResult
    cost: int
    cases: int = 1
    shown: FailureGroup | None = None


@dataclass(slots=True)
class _Run:
    subject: Subject
    options: Options
    watch: Watch
    pool: Pool
    tally: Tally = field(default_factory=Tally)
    groups: dict[Key, _Group] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    lost: str = ""
    incomplete: str = ""
    stopped: bool = False
    shrinking: float = 0.0
    expected: int = 0
    sets: Mapping[str, ProblemSet] = field(default_factory=dict)
    known: frozenset[str] = frozenset()
    ranked: RankedCases | None = None
    given: tuple[Case, ...] = ()
    promises: tuple[Rule, ...] = ()
    probes: SharedProbes = field(default_factory=SharedProbes)

    def run(self) -> RunResult:
        started = time.monotonic()
        profile = profile_of(self.options.profile)
        if self.options.timeout is not None:
            profile = replace(profile, timeout=self.options.timeout)
        if not (self.options.failed or self.options.given or not self.options.corpus):
            begin_lists(self.options.operators)
        facts = self.pool.start()
        self.given = self._failed() if self.options.failed else self.options.given
        deadline = None if self.options.budget is None else time.monotonic() + self.options.budget
        header = self._header(profile, facts)
        self.promises = header.not_promised
        schedule = self._schedule(header, profile)
        path = None if self.options.folder is None else self.options.folder / RESULTS
        resumed = path is not None and self.options.resume and path.exists()
        if resumed:
            assert path is not None
            header = self._take_up(path, header)
        if header.devices > 1:
            self.ranked = self._ranked(schedule, header, profile)
        with ResultsLog(path, resume=resumed) as log:
            if not resumed:
                log.header(header)
            try:
                self._everything(schedule, header, profile, log, deadline)
            except WorkerLost as error:
                self.lost = str(error)
            except KeyboardInterrupt:
                self.incomplete = "interrupted"
            finally:
                if self.ranked is not None:
                    self.ranked.close()
            result = self._result(header, facts, time.monotonic() - started)
            for group in (*result.failures, *result.not_promised):
                log.write("failure", group)
            if not result.incomplete and not result.device_lost:
                log.write("end", {"cases": result.cases, "seconds": result.seconds})
        return result

    # -- what to run ---------------------------------------------------------------------------------------------------

    def _header(self, profile: Profile, facts: Mapping[str, Any]) -> RunHeader:
        from polyaccel_conformance.checks.registry import CHECKS
        from polyaccel_conformance.multi.registry import RANKED_SETS
        from polyaccel_conformance.problems.registry import PROBLEM_SETS

        options = self.options
        # What failed on several ranks is asked again on as many, whatever this command line says.
        devices = max([options.devices, *(case.ranks for case in self.given if options.failed)])
        known = PROBLEM_SETS if devices < 2 else {**PROBLEM_SETS, **RANKED_SETS}
        operators = _names("operator", options.operators, known)
        checks = _names("check", options.checks, CHECKS)
        if options.stop_at and options.stop_at not in checks:
            raise UsageError(f"unknown check {options.stop_at!r}; there are {', '.join(CHECKS)}")
        most = facts["devices"] if facts["device_type"] != "cpu" else max(facts["devices"], os.cpu_count() or 1, 8)
        if not 1 <= devices <= most:
            have = f"{facts['devices']} device{'' if facts['devices'] == 1 else 's'}"
            raise UsageError(f"--devices {devices}: {self.subject.label} has {have}, 1 to {most} ranks are possible")
        scope = facts["scope"]
        outside = tuple(name for name in operators if scope is not None and name not in scope)
        operators = tuple(name for name in operators if name not in outside)
        if not operators:
            raise UsageError(f"{self.subject.label} holds none of the operators asked for: {', '.join(outside)}")
        seed = options.seed
        if seed is None:
            seed = random.SystemRandom().randrange(2**32) if profile.fresh else 0
        return RunHeader(
            subject=self.subject,
            profile=profile.name,
            seed=seed,
            checks=checks,
            operators=operators,
            out_of_scope=outside,
            mappings=facts["mappings"],
            not_promised=tuple(Rule.from_json(item) for item in facts["not_promised"]),
            devices=devices,
            selection=self._selection(),
            environment=facts["environment"],
            suite_revision=SUITE_REVISION,
            contract=format_version(API_VERSION),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def _selection(self) -> str:
        options = self.options
        parts = [f"-k {options.selection}"] if options.selection else []
        parts += [f"--operators {','.join(options.operators)}"] if options.operators else []
        parts += [f"--checks {','.join(options.checks)}"] if options.checks else []
        parts += [f"--stop-at {options.stop_at}"] if options.stop_at else []
        parts += ["--no-corpus"] if not options.corpus else []
        parts += [f"{len(options.given)} given cases"] if options.given else []
        return " ".join([*parts, *(["--failed"] if options.failed else [])])

    def _schedule(self, header: RunHeader, profile: Profile) -> Schedule:
        from polyaccel_conformance.problems.registry import PROBLEM_SETS

        # Some operators have cases of several ranks only.
        self.sets = {name: PROBLEM_SETS[name] for name in header.operators if name in PROBLEM_SETS}
        given: tuple[Case, ...] | None = None
        if self.given:
            self.given = tuple(case for case in self.given if case.operator in header.operators)
            if not self.given:
                raise UsageError(f"none of the cases is one of {', '.join(header.operators)}")
            given = tuple(case for case in self.given if case.ranks == 1)
        return Schedule(
            self.sets, profile, header.seed, parse(self.options.selection), given, corpus=self.options.corpus
        )

    def _failed(self) -> tuple[Case, ...]:
        if self.options.folder is None:
            raise UsageError("--failed needs the folder of an earlier run")
        logged = read_log(self.options.folder / RESULTS)
        cases = tuple(r.case for _, r in logged.results if r.wrong)
        if not cases:
            raise UsageError(f"no case failed in {self.options.folder / RESULTS}")
        return cases

    def _take_up(self, path: Path, header: RunHeader) -> RunHeader:
        """Count what the log holds; its header goes on."""
        logged = read_log(path)
        if self.options.seed is None:
            # A fresh seed was drawn for nothing; the log's is the run's.
            header = replace(header, seed=logged.header.seed)
        if logged.header.identity() != header.identity():
            raise UsageError(f"{path} is of another run: it was started with other options, backend or suite")
        for phase, result in logged.results:
            self._count(phase, result)
        self.tally.controls.update(logged.controls)
        self.known = frozenset(result.case.key for _, result in logged.results)
        return header

    # -- running -------------------------------------------------------------------------------------------------------

    def _everything(
        self, schedule: Schedule, header: RunHeader, profile: Profile, log: ResultsLog, deadline: float | None
    ) -> None:
        schedule = replace(schedule, seed=header.seed)
        fixed = True
        for chunk in ahead(schedule.chunks()):
            if fixed:
                fixed = False
                self.expected = schedule.expected(len(chunk))
                if not chunk and not profile.examples:
                    break
            for item in chunk:
                self.tally.plan(item.case.operator)
            todo = [item for item in chunk if item.case.key not in self.known]
            self._run_chunk(todo, header, profile, log, deadline)
            self._show(profile)
            if self.stopped or self.incomplete:
                break
        if self.stopped:
            return
        if self.options.controls:
            self._controls(header, log)
        if not self.incomplete:
            self._on_ranks(log, deadline)
            self._show(profile)
        if not self.tally.planned:
            raise UsageError(f"nothing is selected by {header.selection}")

    def _controls(self, header: RunHeader, log: ResultsLog) -> None:
        """Of the checks that were asked, on the same device; and why others cannot be asked on it."""
        asked = self.tally.asked(several=False)
        left = [check for check in header.checks if check in CHECKS and check not in self.tally.controls]
        do = {check: "control" if check in asked else "possible" for check in left}
        jobs = [Job(name=check, request={"do": do[check], "check": check}, seconds=CONTROL_SECONDS) for check in left]
        for answer in self.pool.run(jobs):
            check = str(answer.job.name)
            said = _control(answer)
            if said != POSSIBLE:
                self.tally.controls[check] = said
                log.write("control", {"check": check, "control": said})

    def _run_chunk(
        self,
        items: Sequence[Scheduled],
        header: RunHeader,
        profile: Profile,
        log: ResultsLog,
        deadline: float | None,
    ) -> None:
        self.probes.measure(self.pool, (item.case for item in items), header.checks)

        def jobs() -> Iterator[Job]:
            for item in items:
                if self.stopped:
                    return
                if deadline is not None and time.monotonic() >= deadline:
                    self.incomplete = f"the budget of {self.options.budget:g} s was spent; --resume goes on"
                    return
                if self.deaths[item.case.operator] < MAX_DEATHS:
                    yield self._job(item.case, header.checks, profile, item)

        for answer in self.pool.run(jobs()):
            item = answer.job.name
            assert isinstance(item, Scheduled)
            result = self._result_of(answer, item.case)
            log.case(item.phase, result)
            self._count(item.phase, result)
            now = item.case.operator
            self.watch.progress(self.tally.cases, max(self.expected, self.tally.cases), self.tally.failed, now)
            if self.stopped and not self.options.shrink:
                # Nobody needs the workers any more, whatever they are at.
                break
        log.flush()

    def _job(self, case: Case, checks: Sequence[str], profile: Profile, name: object) -> Job:
        request = {"do": "case", "case": case.to_json(), "checks": list(checks), **self.probes.of(case)}
        heavy = self.sets[case.operator].weight >= HEAVY
        return Job(name=name, request=request, seconds=profile.timeout * (HEAVY_PATIENCE if heavy else 1))

    def _result_of(self, answer: Answer, case: Case) -> CaseResult:
        if "result" in answer.reply:
            return judged(result_from_json(answer.reply["result"]), self.promises)
        # A hang costs far more time than a crash.
        self.deaths[case.operator] += MAX_DEATHS // MAX_HANGS if answer.died == HANG else bool(answer.died)
        return judged(lost_result(answer, case), self.promises)

    def _count(self, phase: Phase, result: CaseResult) -> None:
        self.tally.add(result)
        for failure in result.failures:
            key = key_of(result.case.operator, failure)
            price = self._cost(result.case)
            group = self.groups.get(key)
            if group is None:
                self.groups[key] = _Group(simplest=result, cost=price)
            else:
                group.cases += 1
                if price < group.cost and group.shown is None:
                    group.simplest, group.cost = result, price
            if failure.check == self.options.stop_at and not failure.not_promised:
                self.stopped = True
                self.incomplete = f"stopped at the first failure of {failure.check}"

    def _cost(self, case: Case) -> int:
        problems = self.sets.get(case.operator)
        return 0 if problems is None else cost(problems, case)

    def _ranked(self, schedule: Schedule, header: RunHeader, profile: Profile) -> RankedCases:
        return RankedCases(
            self.subject,
            header,
            profile,
            schedule.selects,
            self.pool.server,
            given=tuple(case for case in self.given if case.ranks > 1) if self.given else None,
            corpus=self.options.corpus,
        )

    def _on_ranks(self, log: ResultsLog, deadline: float | None) -> None:
        if self.ranked is None:
            return
        for item, result in self.ranked.results(self.known, self.tally, deadline):
            for identity in self.ranked.newcomers():
                log.write("rank", identity)
            log.case(item.phase, result)
            self._count(item.phase, result)
            self.watch.progress(self.tally.cases, self.tally.planned_cases, self.tally.failed, item.case.operator)
            if self.stopped:
                return
        self.incomplete = self.incomplete or self.ranked.incomplete
        if not self.options.controls:
            return
        for check, control in self.ranked.controls(self.tally).items():
            self.tally.controls[check] = control
            log.write("control", {"check": check, "control": control})

    # -- failures ------------------------------------------------------------------------------------------------------

    def _show(self, profile: Profile) -> None:
        for key, group in self.groups.items():
            if group.shown is None:
                group.shown = self._minimal(key, group, profile)
                if not group.shown.failure.not_promised:
                    self.watch.failure(group.shown)

    def _minimal(self, key: Key, group: _Group, profile: Profile) -> FailureGroup:
        operator, check, cause, excuse = key
        best, tries, seconds = group.simplest, 0, 0.0
        # Often one defect fails several checks: its minimal case may be known.
        shown = [g.shown.result for g in self.groups.values() if g.shown is not None]
        known = next((result for result in shown if _failure(result, key) is not None), None)
        problems = self.sets.get(operator)
        if best.case.ranks > 1 and self.ranked is not None:
            problems = self.ranked.problems(best.case)
        left = min(profile.shrink_seconds, SHRINK_TOTAL - self.shrinking)
        if known is not None:
            best = known
        elif self.options.shrink and left > 0 and problems is not None and not excuse:

            def run_cases(cases: Sequence[Case]) -> Sequence[CaseResult]:
                if self.ranked is not None and best.case.ranks > 1:
                    return [self.ranked.run(case) for case in cases]
                jobs = [self._job(case, self._asked(best), profile, place) for place, case in enumerate(cases)]
                answers = {answer.job.name: answer for answer in self.pool.run(jobs)}
                return [self._result_of(answers[place], case) for place, case in enumerate(cases)]

            found = shrink(problems, best, lambda result: _failure(result, key) is not None, run_cases, left)
            best, tries, seconds = found.result, found.tries, found.seconds
            self.shrinking += seconds
        failure = _failure(best, key)
        assert failure is not None
        path = self._write(best, failure, group.simplest.case)
        return FailureGroup(
            operator=operator,
            check=check,
            cause=cause,
            cases=group.cases,
            failure=failure,
            result=best,
            original=group.simplest.case,
            shrink=tries,
            shrink_seconds=seconds,
            path=path,
        )

    def _asked(self, result: CaseResult) -> tuple[str, ...]:
        from polyaccel_conformance.checks.registry import CHECKS

        return result.checks or (self.options.checks or tuple(CHECKS))

    def _write(self, result: CaseResult, failure: Failure, original: Case) -> str:
        if self.options.folder is None:
            return ""
        file = CaseFile(
            case=result.case,
            failure=failure,
            subject=self.subject,
            digests=result.digests,
            observed=result.observed,
            original=original,
            spec=spec_revision(result.case.operator),
            environment=self.pool.facts["environment"],
        )
        return str(file.write(self.options.folder / CASES))

    # -- the result ----------------------------------------------------------------------------------------------------

    def _result(self, header: RunHeader, facts: Mapping[str, Any], seconds: float) -> RunResult:
        shown = [group.shown for group in self.groups.values() if group.shown is not None]
        groups, excused = failure_groups(self.tally.results, shown)
        checks = self.tally.check_states(header.checks)
        empty: tuple[str, ...] = ()
        whole = header.complete and not self.incomplete and not self.lost
        if whole and self.subject.kind == "backend":
            empty = self.tally.empty_cells(header, checks, facts)
        return RunResult(
            header=header,
            operators=self.tally.operator_states(header),
            checks=checks,
            cells=self.tally.cells(),
            failures=groups,
            not_promised=excused,
            incomplete=self.incomplete,
            device_lost=self.lost,
            empty_cells=empty,
            seconds=seconds,
        )


def lost_result(answer: Answer, case: Case) -> CaseResult:
    """The result of a case whose worker died or hung, or which the suite could not build or judge: never a pass."""
    if answer.died:
        failure = Failure(check=WORKER, cause=answer.died, message=answer.log or "the process ended")
    else:
        error = answer.reply["error"]
        failure = Failure(check=WORKER, cause=f"suite error: {error['type']}", message=error["message"])
    return CaseResult(case=case, failures=(failure,), checks=(), implementation="", kind="")


def _failure(result: CaseResult, key: Key) -> Failure | None:
    """The failure that belongs to a group, if the case has it."""
    return next((failure for failure in result.failures if key_of(result.case.operator, failure) == key), None)


def _control(answer: Answer) -> str:
    """What a control did, with the reason where it is impossible."""
    control, reason = answer.reply.get("control"), answer.reply.get("reason")
    if control is None:
        return f"did not end: {answer.died or _error(answer)}"
    return f"{control}: {reason}" if reason else str(control)


def _error(answer: Answer) -> str:
    error = answer.reply.get("error", {})
    return f"{error.get('type')}: {error.get('message')}"


def _names(what: str, asked: tuple[str, ...], known: Mapping[str, object]) -> tuple[str, ...]:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UsageError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return asked or tuple(known)
