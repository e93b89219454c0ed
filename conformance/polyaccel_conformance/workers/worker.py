"""What a worker runs: it opens the backend, then answers one request after the other.

Requests and answers are JSON. ``open`` comes first; ``case`` answers a :class:`CaseResult`, ``measure`` what a probe
finds, ``control`` what a check's control did, ``dump`` writes the arrays of a case. An answer has ``"error"`` where the
suite itself could not go on.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyaccel.backend import Backend
from polyaccel.backend.errors import BackendUnavailable
from polyaccel_conformance.bench import FOLDER, Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, run_case
from polyaccel_conformance.harness.isolation import STARTER
from polyaccel_conformance.probes.shared import measure, remember
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.promises import mappings, rules, sources
from polyaccel_conformance.results import encode
from polyaccel_conformance.subject import OperatorTable, Subject
from polyaccel_conformance.workers.oracle_cache import OracleCache
from polyaccel_conformance.workers.process import ForkServer

TARGET = "polyaccel_conformance.workers.worker:main"


@dataclass(slots=True)
class Worker:
    """One opened backend and the cases that are run on it."""

    bench: Bench
    cache: OracleCache = field(default_factory=OracleCache)

    def case(self, request: Mapping[str, Any]) -> dict[str, Any]:
        problem = self._problem(request["case"])
        if "measured" in request:
            remember(self.bench, problem.case, request["measured"])
        alone = len(request["checks"]) == 1
        result = encode(run_case(self.bench, problem, checks_named(request["checks"]), thorough=alone))
        return {"result": result, "retire": not self._healthy()}

    def measure(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"measured": measure(self.bench, request["operator"], request["dtype"]), "retire": not self._healthy()}

    def control(self, request: Mapping[str, Any]) -> dict[str, Any]:
        (check,) = checks_named([request["check"]])
        said = self.possible(request)
        return said if said["reason"] else {**said, "control": check.control(self.bench)}

    def possible(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Whether a check that no case asks could be asked here."""
        (check,) = checks_named([request["check"]])
        reason = check.unavailable(self.bench)
        return {"control": "impossible here" if reason else "possible", "reason": reason}

    def dump(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from polyaccel_conformance.dump import dump

        dump(self.bench, self._problem(request["case"]), Path(request["path"]), run=request["run"])
        return {"path": request["path"]}

    def _healthy(self) -> bool:
        """Whether the device still does what it is told: a failure that comes late would be blamed on the next case."""
        try:
            self.bench.upload(torch.zeros(1))
            self.bench.synchronize()
        except Exception:
            # Of any type: what was queued may fail only now.
            return False
        return True

    def _problem(self, value: Mapping[str, Any]) -> Problem:
        from polyaccel_conformance.problems.registry import PROBLEM_SETS

        case = Case.from_json(value)
        problem = PROBLEM_SETS[case.operator].problem(case)
        self.cache.attach(problem)
        return problem


def main(
    connection: Connection, subject: Mapping[str, str], device: int, folder: str, server: int | None = None
) -> None:
    """Serve until the parent closes the connection.

    ``folder``: the workers' own, that they share; ``server``: the descriptor of a forkserver of this worker's own.
    """
    faulthandler.enable(sys.stderr)
    try:
        bench, facts = open_bench(Subject.from_json(subject), device)
    except Exception as error:
        _send(connection, {"error": {"type": type(error).__name__, "message": str(error)}})
        return
    _send(connection, {"facts": facts})
    bench.memo[FOLDER] = Path(folder)
    if server is not None:
        bench.memo[STARTER] = ForkServer(descriptor=server)
    worker = Worker(bench=bench)
    actions: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "case": worker.case,
        "measure": worker.measure,
        "control": worker.control,
        "possible": worker.possible,
        "dump": worker.dump,
    }
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            answer = actions[request["do"]](request)
        except Exception as error:
            answer = {"error": {"type": type(error).__name__, "message": f"{error}{_where(error)}"}}
        _send(connection, answer)
    bench.backend.close()


def open_bench(subject: Subject, device: int) -> tuple[Bench, dict[str, Any]]:
    """The backend on one of its devices, and what the runner wants to know of it.

    Raises:
        UsageError, BackendUnavailable: with the reason.
    """
    backend = subject.open()
    availability = backend.probe()
    if not availability.usable:
        raise BackendUnavailable(f"backend {backend.name!r} cannot be used here: {availability.reason}")
    devices = list(backend.devices())
    bench = Bench(backend, devices[device % len(devices)], subject=subject)
    # Only a table's entries say how they are called and what they never promised.
    entries = backend.operators() if subject.kind == "table" else {}
    facts = {
        "fork_safe": backend.fork_safe,
        "devices": len(devices),
        "device_type": bench.device.torch_device.type,
        "scope": sorted(backend.given) if isinstance(backend, OperatorTable) else None,
        "mappings": mappings(entries),
        "not_promised": encode(rules(entries)),
        "graphs": "; ".join(backend.graph_refusals()),
        "environment": {**_environment(backend, bench, subject, sources(entries)), **_sources(backend, subject)},
    }
    return bench, facts


def checks_named(names: list[str]) -> list[Check]:
    """Checks by name, in this order."""
    from polyaccel_conformance.checks.registry import CHECKS

    return [CHECKS[name] for name in names]


def _environment(backend: Backend, bench: Bench, subject: Subject, kernels: tuple[str, ...]) -> dict[str, str]:
    found = {
        "backend": backend.name,
        "class": f"{type(backend).__module__}.{type(backend).__qualname__}",
        "device": bench.device.name,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }
    if subject.kind == "backend":
        for entry in metadata.entry_points(group="polyaccel.backends", name=subject.name):
            if entry.dist is not None:
                found["distribution"] = f"{entry.dist.name} {entry.dist.version}"
    module = getattr(torch, bench.torch_device.type, None)
    if module is not None and hasattr(module, "get_device_name"):
        found["hardware"] = str(module.get_device_name(bench.torch_device))
    if kernels:
        found["kernels"] = ", ".join(kernels)
    return found


def _sources(backend: Backend, subject: Subject) -> dict[str, str]:
    """What a certificate states beyond that. Hashing takes a while, and nobody certifies a planted bug or a table."""
    from polyaccel_conformance.certificate.environment import environment

    return environment(subject.name, backend) if subject.kind == "backend" and not subject.mutant else {}


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    code = trace.tb_frame.f_code
    return f" (in {code.co_name}, {Path(code.co_filename).name} line {trace.tb_lineno})"


def _send(connection: Connection, answer: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())
