"""Case files: a failure as a few hundred bytes that anybody can replay with identical inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from polyaccel.backend import OPERATORS, STATIONS
from polyaccel.backend.version import API_VERSION, format_version
from polyaccel_conformance import SUITE_REVISION
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.results import NOTHING, encode, failure_from_json
from polyaccel_conformance.subject import Subject

FORMAT = 1


class Outcome(Enum):
    """What a replay shows."""

    REPRODUCED = "REPRODUCED"
    NOT_REPRODUCED = "NOT REPRODUCED"
    DIFFERENT_FAILURE = "DIFFERENT FAILURE"

    @property
    def exit_code(self) -> ExitCode:
        return _CODES[self]


_CODES = {
    Outcome.NOT_REPRODUCED: ExitCode.PASS,
    Outcome.REPRODUCED: ExitCode.FAIL,
    Outcome.DIFFERENT_FAILURE: ExitCode.DIFFERENT_FAILURE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFile:
    """A case that failed, and all that is needed to tell whether it fails again for the same reason.

    Attributes:
        failure: the one that the file is about; its ``index`` is the worst element.
        subject: which backend showed it.
        digests: hash of each input.
        observed: hash of the outputs.
        original: the case before it was made minimal.
        generator: revision of the generators of data; ``spec``: the contract's version and hash of the operator's
            specification.
        environment: where it was seen.
    """

    case: Case
    failure: Failure
    subject: Subject
    digests: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    observed: str = ""
    original: Case | None = None
    generator: int = SUITE_REVISION
    spec: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: NOTHING)

    def write(self, folder: Path) -> Path:
        """As ``<operator>-<check>-<key>.json`` in a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        check = self.failure.check.replace("/", "-")
        path = folder / f"{self.case.operator}-{check}-{self.case.key}.json"
        path.write_text(json.dumps({"format": FORMAT, **encode(self)}, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> CaseFile:
        """Raises UsageError: no such file, or it is no case file of this format."""
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise UsageError(f"{path} is not a case file of format {FORMAT}")
            fields = {f.name: value[f.name] for f in dataclasses.fields(cls)}
            original = fields["original"]
            return cls(
                **{
                    **fields,
                    "case": Case.from_json(fields["case"]),
                    "failure": failure_from_json(fields["failure"]),
                    "subject": Subject.from_json(fields["subject"]),
                    "original": None if original is None else Case.from_json(original),
                }
            )
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a case file: {type(error).__name__}: {error}") from error

    def revision_changes(self) -> list[str]:
        """What has changed in the suite since the file was written, in words."""
        changes = []
        if self.generator != SUITE_REVISION:
            changes.append(f"generator revision {self.generator}, here {SUITE_REVISION}")
        here = spec_revision(self.case.operator)
        if self.spec != here:
            changes.append(f"specification {self.spec}, here {here}")
        return changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A case file run again.

    ``differing``: inputs whose hash is not the file's; ``same_output``: whether the outputs have the recorded bits.
    """

    outcome: Outcome
    differing: tuple[str, ...]
    same_output: bool
    result: CaseResult

    @property
    def inputs_identical(self) -> bool:
        return not self.differing

    @property
    def exit_code(self) -> ExitCode:
        if not self.inputs_identical and self.outcome is Outcome.NOT_REPRODUCED:
            # A pass on other data says nothing about the file's.
            return ExitCode.INCONCLUSIVE
        return self.outcome.exit_code


def judge(file: CaseFile, result: CaseResult) -> Replay:
    """Compare what happened with what the file says."""
    names = sorted({*file.digests, *result.digests})
    # A case that crashes gives no hashes; there is nothing to compare then.
    differing = [n for n in names if file.digests.get(n) != result.digests.get(n)] if result.digests else []
    if result.passed:
        outcome = Outcome.NOT_REPRODUCED
    elif any((f.check, f.cause) == (file.failure.check, file.failure.cause) for f in result.failures):
        outcome = Outcome.REPRODUCED
    else:
        outcome = Outcome.DIFFERENT_FAILURE
    return Replay(
        outcome=outcome,
        differing=tuple(differing),
        same_output=bool(file.observed) and file.observed == result.observed,
        result=result,
    )


def spec_revision(operator: str) -> str:
    """The contract's version and a hash of the operator's specification: ``1.0+9c2f41d07a55``."""
    spec = OPERATORS.get(operator) or STATIONS.get(operator)
    text = "" if spec is None else f"{spec.semantics}|{spec.returns}|{spec.numerics}|{spec.arguments}"
    return f"{format_version(API_VERSION)}+{hashlib.sha256(text.encode()).hexdigest()[:12]}"
