"""A bundle: one archive that holds a run's log, what follows from it, and a hash of each."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyaccel_conformance.certificate.condense import condensed
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.certificate.signature import Signer
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.levels.grant import NATIVE_REQUIRED
from polyaccel_conformance.log import parse_log
from polyaccel_conformance.report.markdown import markdown
from polyaccel_conformance.report.model import Report
from polyaccel_conformance.waivers import Waiver

FORMAT = 1
LOG, SUMMARY, PAGE, WAIVERS, MANIFEST, SIGNATURE = (
    "log.jsonl",
    "summary.json",
    "certificate.md",
    "waivers.json",
    "manifest.json",
    "signature.json",
)
REQUIRED = (LOG, SUMMARY, PAGE, WAIVERS, MANIFEST)
LARGEST = 1 << 30
"""Bytes of one file of a bundle; more is refused before it is read."""

Kind = Literal["certificate", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The files of an archive as they lie in it; nothing has been checked."""

    path: Path
    files: Mapping[str, bytes]

    def json(self, name: str) -> Any:
        """Raises UsageError where the file is not JSON."""
        try:
            return json.loads(self.files[name])
        except (ValueError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path}: {name} is not JSON: {error}") from error


def kind_of(report: Report) -> Kind:
    """A certificate needs a complete run of a backend without a failure that no waiver covers, and at least a level.
    Everything else is a report."""
    result = report.result
    earned = any(level.earned for level in report.levels)
    whole = result.header.complete and not result.incomplete and not result.device_lost
    # A planted bug that some level does not see is no reason to certify it.
    whole = whole and not result.header.subject.mutant
    return "certificate" if whole and earned and exit_code(report) is ExitCode.PASS else "report"


def exit_code(report: Report) -> ExitCode:
    """Of a run with its waivers: failures that waivers cover do not count, waivers that lie do."""
    result = report.result
    if result.device_lost:
        return ExitCode.DEVICE_LOST
    denied = any(NATIVE_REQUIRED in reason for level in report.levels for reason in level.reasons)
    if report.applied.uncovered or report.applied.problems or result.empty_cells or denied:
        return ExitCode.FAIL
    inconclusive = any(state.verdict == "inconclusive" for state in result.checks)
    return ExitCode.INCONCLUSIVE if result.incomplete or not result.cases or inconclusive else ExitCode.PASS


def summary(report: Report) -> dict[str, Any]:
    """What a bundle states, as JSON."""
    return {"format": FORMAT, "kind": kind_of(report), **report.to_json()}


def render(report: Report) -> str:
    """The bundle's Markdown: a certificate by its levels, or a report that says it is none."""
    text = markdown(report)
    if kind_of(report) == "certificate":
        return text.replace("# Conformance report:", "# Certificate:", 1)
    return text


def write_bundle(
    path: Path, log: Path, waivers: Sequence[Waiver] = (), *, signer: Signer | None = None, require_native: bool = False
) -> Kind:
    """Write the bundle of a log. The same log and waivers give the same bytes, signature aside.

    Raises:
        UsageError: the log is none, or the file cannot be written.
    """
    data = _condensed(log)
    report = recount(parse_log(data, str(log)), waivers, require_native=require_native)
    files = {
        LOG: data,
        SUMMARY: _json({**summary(report), "require_native": require_native}),
        PAGE: render(report).encode(),
        WAIVERS: _json([waiver.to_json() for waiver in waivers]),
    }
    files[MANIFEST] = manifest(files)
    if signer is not None:
        files[SIGNATURE] = _json(signer.sign(files[MANIFEST]))
    try:
        _archive(path, files)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    return kind_of(report)


def _condensed(log: Path) -> bytes:
    try:
        return condensed(log.read_bytes())
    except OSError as error:
        raise UsageError(f"{log} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise UsageError(f"{log} is not a results log: {type(error).__name__}: {error}") from error


def manifest(files: Mapping[str, bytes]) -> bytes:
    """The hash of every file."""
    return _json({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _archive(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            # No times, owners or modes: equal contents are equal archives.
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def read_bundle(path: Path) -> Bundle:
    """Raises UsageError: no such file, no archive, or not a bundle's files."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for entry in archive:
                if not entry.isfile() or entry.name not in (*REQUIRED, SIGNATURE) or entry.size > LARGEST:
                    raise UsageError(f"{path} holds {entry.name!r}, which no bundle does")
                content = archive.extractfile(entry)
                files[entry.name] = b"" if content is None else content.read()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UsageError(f"{path} is not a bundle: {error}") from error
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise UsageError(f"{path} is not a bundle: it lacks {', '.join(missing)}")
    return Bundle(path=path, files=files)
