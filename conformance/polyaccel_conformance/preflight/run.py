"""The preflight: every question is asked, whatever the others answered."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping

import torch

from polyaccel.backend import API_VERSION, OPERATORS, STATIONS, Backend, BackendUnavailable, Device
from polyaccel.backend.registry import InstalledBackend, installed
from polyaccel.backend.version import format_version
from polyaccel_conformance.preflight.aten import Attempts, Execute, Recording, execute_on, needs, record
from polyaccel_conformance.preflight.facts import device_findings, first_line
from polyaccel_conformance.preflight.finding import LOADS, STORAGE, Finding, Mark, OperatorNeeds, Preflight
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.subject import SIMULATED, Subject

LOWEST_TORCH = (2, 8)
CASES = 24
"""Cases of each composite that are looked at: about one for each value of a short axis."""
BUDGET = 8.0
"""Seconds for running composites; what is left of them then is looked at with one case each."""
ON_DEVICE = 8.0
"""Seconds for making their calls on the device; what is left of them then is named as not tried."""


def preflight(
    subject: Subject,
    problem_sets: Mapping[str, ProblemSet] | None = None,
    *,
    devices: int = 1,
    execute: Execute = execute_on,
    budget: float = BUDGET,
    examine: bool | None = None,
) -> Preflight:
    """Everything that can be known of ``subject`` before the first case. Does not raise for what the backend does.

    Args:
        subject: the backend or table.
        problem_sets: operators to look at; all by default.
        devices: how many devices the run wants.
        execute: makes a recorded aten call on a device.
        budget: seconds for running composites.
        examine: whether to look for missing aten operators; None: unless the device is the CPU, which has them all.
    """
    if problem_sets is None:
        from polyaccel_conformance.problems.registry import PROBLEM_SETS

        # Questions about devices and storage are no operators.
        problem_sets = {name: s for name, s in PROBLEM_SETS.items() if name in OPERATORS or name in STATIONS}
    began = time.perf_counter()
    findings = list(_environment())
    if subject.kind == "backend":
        findings += _discovery(subject.name)
    backend, opened = _open(subject)
    findings += opened
    table: list[OperatorNeeds] = []
    if backend is not None:
        found, more = _devices(backend, devices)
        findings += more
        for device in found:
            findings += device_findings(backend, device)
        if found and (examine if examine is not None else found[0].torch_device.type != "cpu"):
            table = _aten(backend, found[0], problem_sets, execute, budget)
        backend.close()
    name = subject.name if subject.kind == "backend" else f"{subject.path}:{subject.name}"
    return Preflight(subject=name, findings=tuple(findings), table=tuple(table), seconds=time.perf_counter() - began)


def _environment() -> Iterator[Finding]:
    version = torch.__version__
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    lowest = ".".join(map(str, LOWEST_TORCH))
    good = numbers >= LOWEST_TORCH
    yield Finding(
        section="environment",
        name="torch",
        mark=Mark.OK if good else Mark.FAIL,
        detail=version if good else f"{version}, at least {lowest} is needed",
    )
    yield Finding(section="environment", name="Python", mark=Mark.OK, detail=platform.python_version())
    yield Finding(section="environment", name="contract", mark=Mark.OK, detail=format_version(API_VERSION))


def _discovery(name: str) -> Iterator[Finding]:
    def line(what: str, mark: Mark, detail: str) -> Finding:
        return Finding(section="backend", name=what, mark=mark, detail=detail)

    if name == SIMULATED:
        yield line("discovery", Mark.OK, "comes with the suite and has no entry point")
        return
    try:
        known = {entry.name: entry for entry in installed()}
    except BackendUnavailable as error:
        yield line("discovery", Mark.FAIL, first_line(error))
        return
    entry: InstalledBackend | None = known.get(name)
    if entry is None:
        yield line("discovery", Mark.FAIL, f"no backend {name!r} is installed; installed are {sorted(known)}")
        return
    yield line("discovery", Mark.OK, entry.origin)
    refusal = entry.api_refusal()
    yield line("API range", Mark.FAIL if refusal else Mark.OK, refusal or str(entry.api))


def _open(subject: Subject) -> tuple[Backend | None, list[Finding]]:
    def line(what: str, mark: Mark, detail: str = "") -> Finding:
        return Finding(section="backend", name=what, mark=mark, detail=detail)

    try:
        backend = subject.open()
    except Exception as error:
        return None, [line(LOADS, Mark.FAIL, f"{type(error).__name__}: {first_line(error)}")]
    found = [line(LOADS, Mark.OK)]
    try:
        availability = backend.probe()
        found.append(line("probe", Mark.OK if availability.usable else Mark.FAIL, availability.reason))
    except Exception as error:
        found.append(line("probe", Mark.FAIL, f"raised {type(error).__name__}: {first_line(error)}; it must not raise"))
    try:
        table = backend.table()
        mandatory = [name for name in ("linear", "dequantize") if name not in table]
        detail = f"{len(table)} native: {', '.join(sorted(table))}" if not mandatory else f"missing {mandatory}"
        found.append(line("operators", Mark.FAIL if mandatory else Mark.OK, detail))
        silent = sorted(name for name, entries in table.items() if any(not entry.evidence for entry in entries))
        if silent:
            found.append(line("evidence", Mark.NOTE, f"no evidence declared by {', '.join(silent)}"))
    except Exception as error:
        found.append(line("operators", Mark.FAIL, f"{type(error).__name__}: {first_line(error)}"))
    return backend, found


def _devices(backend: Backend, wanted: int) -> tuple[list[Device], list[Finding]]:
    try:
        found = list(backend.devices())
    except Exception as error:
        detail = f"{type(error).__name__}: {first_line(error)}"
        return [], [Finding(section="backend", name="devices", mark=Mark.FAIL, detail=detail)]
    detail = ", ".join(f"{device.name} ({device.torch_device})" for device in found) or "none"
    lines = [Finding(section="backend", name="devices", mark=Mark.OK if found else Mark.FAIL, detail=detail)]
    if len(found) < 2:
        lines.append(
            Finding(
                section="backend",
                name="second device",
                mark=Mark.ABSENT,
                detail="checks of the wrong current device are not exercised",
            )
        )
    if 1 < len(found) < wanted:
        lines.append(
            Finding(
                section="backend",
                name="ranks",
                mark=Mark.FAIL,
                detail=f"{wanted} devices were asked for, there are {len(found)}",
            )
        )
    return found, lines


def _aten(
    backend: Backend, device: Device, problem_sets: Mapping[str, ProblemSet], execute: Execute, budget: float
) -> list[OperatorNeeds]:
    recording = Recording()
    began = time.perf_counter()
    unknown: dict[str, str] = {}
    share = budget / max(len(problem_sets), 1)
    for i, (operator, problem_set) in enumerate(problem_sets.items()):
        late = time.perf_counter() - began > (i + 1) * share
        reason = record(problem_set, recording, 1 if late else CASES)
        if reason:
            unknown[operator] = reason
    operators = dict.fromkeys([STORAGE, *problem_sets, *recording.samples])
    attempts = Attempts(device, execute, time.monotonic() + ON_DEVICE)
    rows = []
    for operator in operators:
        if operator in unknown and operator not in recording.samples:
            rows.append(OperatorNeeds(operator=operator, missing={}, unknown=unknown[operator]))
        elif operator in recording.samples:
            rows.append(needs(operator, recording, backend, attempts))
    return rows
