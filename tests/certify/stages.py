"""The stages: each a few commands as a user would type them, and what they came to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.certify.backends import Installed, Tested
from tests.certify.state import Outcome, Verdict
from tests.support.plugins import ROOT, environment

RESULT = "result.json"
RERUN = 100
LARGEST = 2_500_000
"""Bytes of a certificate that is committed."""
MARGIN = 20.0
"""Seconds of a part's budget that are kept for opening and closing."""
HANGS = 5400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a stage works and what it is given.

    Attributes:
        work: folder for results, which may be thrown away; ``certificates``: folder for bundles.
        installed: the backends' environments.
        profile: of the runs; ``more``: further options of every run, for trying this program on little.
    """

    work: Path
    certificates: Path
    installed: Installed
    profile: str = "default"
    more: tuple[str, ...] = ()


class Stage(ABC):
    """One line of the log."""

    name: str

    @abstractmethod
    def run(self, place: Place, budget: float | None) -> Outcome:
        """Do it, or as much of it as ``budget`` seconds allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A command that ended: its exit code and output."""

    code: int
    output: str

    @property
    def last(self) -> str:
        """The last line that says something."""
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "no output")

    @property
    def verdict(self) -> str:
        """The exit code, and the line of a run that sums it up."""
        found = re.findall(r"^[A-Z_]+: \d+ cases of .*$", self.output, re.MULTILINE)
        return f"exit code {self.code}: {found[-1] if found else self.last}"


def call(command: Sequence[str], variables: Mapping[str, str], log: Path) -> Ran:
    """Run a command with its output in ``log`` as well; one that hangs is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(command, env=dict(variables), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(HANGS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
            raise
    with log.open("rb") as written:
        written.seek(start)
        return Ran(code=code, output=written.read().decode(errors="replace"))


def conformance(words: Sequence[str], variables: Mapping[str, str], log: Path) -> Ran:
    return call([sys.executable, "-m", "polyaccel.cli.main", "conformance", *words], variables, log)


def suite_run(
    words: Sequence[str], folder: Path, place: Place, budget: float | None, variables: Mapping[str, str], log: Path
) -> tuple[Ran, dict[str, object]]:
    """A run of the suite that goes on where an earlier part ended; its result is the JSON that it wrote."""
    if (folder / "results.jsonl").is_file():
        words = [*words, "--resume"]
    if budget is not None:
        words = [*words, "--budget", f"{max(budget - MARGIN, 1.0):.0f}"]
    result = folder / RESULT
    result.unlink(missing_ok=True)
    ran = conformance(["run", *words, "--no-progress", "--out", str(folder), *place.more], variables, log)
    return ran, json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}


def goes_on(result: Mapping[str, object]) -> bool:
    """Whether the run came to the end of its budget."""
    return "--resume goes on" in str(result.get("incomplete", ""))


def figures(result: Mapping[str, object]) -> str:
    """``4134 cases, 0 failed``."""
    operators = result.get("operators")
    states = operators if isinstance(operators, list) else []
    return f"{sum(s['cases'] for s in states)} cases, {sum(s['failed'] for s in states)} failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate(Stage):
    """A backend's certificate: the run, its bundle, and the bundle verified with a sample executed again.

    ``profile``: another than the one of all runs; such a bundle is checked and not published.
    """

    tested: Tested
    profile: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"certificate {self.tested.name}" if not self.profile else f"{self.profile} {self.tested.name}"

    def run(self, place: Place, budget: float | None) -> Outcome:
        began = time.monotonic()
        backend, name = self.tested.name, "-".join(filter(None, (self.tested.name, self.profile)))
        log = place.work / f"{name}.log"
        variables = place.installed.variables(self.tested)
        bundle = place.work / f"{name}.tar.xz"
        words = ["--backend", backend, "--profile", self.profile or place.profile]
        words += ["--devices", str(self.tested.devices), "--bundle", str(bundle)]
        ran, result = suite_run(words, place.work / name, place, budget, variables, log)

        def outcome(verdict: Verdict, more: str) -> Outcome:
            seconds = time.monotonic() - began
            return Outcome(verdict=verdict, figures=f"{figures(result)}; {more}", seconds=seconds)

        if goes_on(result):
            return outcome("partial", "to be gone on with")
        if ran.code != 0:
            return outcome("failed", ran.verdict)
        kind = ran.last.rpartition(" ")[2]
        if kind != "certificate" and not place.more:
            return outcome("failed", f"the bundle is a {kind}")
        checked = conformance(["verify", str(bundle), "--rerun", str(RERUN)], variables, log)
        if checked.code != 0:
            return outcome("failed", f"verify: {checked.last}")
        size = bundle.stat().st_size
        publish = kind == "certificate" and not self.profile
        if publish and size > LARGEST:
            return outcome("failed", f"the bundle has {size} bytes, {LARGEST} are allowed")
        if publish:
            place.certificates.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle, place.certificates / bundle.name)
        return outcome("passed", f"{kind}, {size // 1000} kB, {checked.last}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Stage):
    """A backend that must fail."""

    backend: str

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.backend} fails"

    def run(self, place: Place, budget: float | None) -> Outcome:
        began = time.monotonic()
        words = ["run", "--backend", self.backend, "--profile", place.profile, "--no-progress"]
        out = ["--out", str(place.work / self.backend)]
        ran = conformance([*words, *out], environment(), place.work / f"{self.backend}.log")
        verdict = "passed" if ran.code == 1 else "failed"
        return Outcome(verdict=verdict, figures=f"exit code {ran.code}", seconds=time.monotonic() - began)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshSeed(Stage):
    """The drawn cases of another seed on the CPU backend: a false alarm would show here."""

    seed: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"cpu seed {self.seed}"

    def run(self, place: Place, budget: float | None) -> Outcome:
        began = time.monotonic()
        words = ["--backend", "cpu", "--profile", place.profile, "--seed", str(self.seed), "--no-corpus"]
        folder = place.work / f"seed-{self.seed}"
        ran, result = suite_run(words, folder, place, budget, environment(), place.work / "seeds.log")
        seconds = time.monotonic() - began
        if goes_on(result):
            return Outcome(verdict="partial", figures=figures(result), seconds=seconds)
        verdict = "passed" if ran.code == 0 else "failed"
        text = figures(result) + ("" if ran.code == 0 else f"; {ran.verdict}")
        return Outcome(verdict=verdict, figures=text, seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests(Stage):
    """A folder of the suite's own tests, the long ones included."""

    folder: str

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"tests {self.folder}"

    def run(self, place: Place, budget: float | None) -> Outcome:
        began = time.monotonic()
        variables = {**os.environ, "POLYACCEL_LONG_TESTS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", self.folder]
        ran = call(command, variables, place.work / f"{self.folder.replace('/', '-')}.log")
        counts = re.sub(r" in [0-9.]+s.*", "", ran.last.strip("= "))
        # 5: the folder holds no test.
        verdict = "passed" if ran.code in (0, 5) else "failed"
        return Outcome(verdict=verdict, figures=counts, seconds=time.monotonic() - began)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Stage):
    """Any other program; it passes with exit code 0.

    ``words``: ``{work}`` in one is this program's folder. ``in_parts``: it takes ``--budget``, keeps what it has
    done, and ends with 3 where something is left.
    """

    name: str
    words: tuple[str, ...]
    in_parts: bool = False

    def run(self, place: Place, budget: float | None) -> Outcome:
        began = time.monotonic()
        words = [word.replace("{work}", str(place.work)) for word in self.words]
        if self.in_parts and budget is not None:
            words += ["--budget", f"{max(budget - MARGIN, 1.0):.0f}"]
        log = place.work / f"{self.name.replace(' ', '-')}.log"
        ran = call([sys.executable, *words], environment(), log)
        verdict: Verdict = "passed" if ran.code == 0 else "partial" if self.in_parts and ran.code == 3 else "failed"
        return Outcome(verdict=verdict, figures=ran.last, seconds=time.monotonic() - began)


def folders_of_tests() -> Iterator[str]:
    """Below tests/conformance, each folder, and the files beside them."""
    here = ROOT / "tests" / "conformance"
    yield from sorted(
        path.relative_to(ROOT).as_posix()
        for path in here.iterdir()
        if (path.is_dir() and any(path.rglob("test_*.py"))) or path.name.startswith("test_")
    )
