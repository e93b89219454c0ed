"""``polyaccel conformance report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from polyaccel_conformance.errors import UsageError

HELP = "what a run found, as text, JSON, Markdown, one HTML page or a bundle; or what differs between two"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="?", metavar="FOLDER", help="of a run, or its results.jsonl")
    parser.add_argument("--diff", type=Path, nargs=2, metavar=("A", "B"), help="compare two bundles or runs instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--headroom", type=Path, metavar="FILE.md", help="worst err / tol by operator and dtype")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page that needs nothing but itself")
    parser.add_argument("--bundle", type=Path, metavar="FILE.tar.xz", help="a certificate if the run earned one")
    parser.add_argument("--waivers", type=Path, metavar="FILE.toml", help="known failures")
    parser.add_argument("--require-native", action="store_true", help="a composite denies its levels")
    parser.add_argument("--sign", type=Path, metavar="KEY.pem", help="sign the bundle with an Ed25519 key")


def run(options: argparse.Namespace) -> int:
    from polyaccel_conformance.certificate.bundle import exit_code, write_bundle
    from polyaccel_conformance.certificate.diff import diff_summaries
    from polyaccel_conformance.certificate.recount import recount
    from polyaccel_conformance.certificate.signature import Signer
    from polyaccel_conformance.log import read_log
    from polyaccel_conformance.report.markdown import headroom, markdown
    from polyaccel_conformance.report.page import page
    from polyaccel_conformance.report.terminal import terminal
    from polyaccel_conformance.waivers import read_waivers

    if options.diff is not None:
        before, after = map(_summary, options.diff)
        print(diff_summaries(before, after), end="")
        return 0
    if options.results is None:
        raise UsageError("name the folder of a run, or two bundles or runs after --diff")
    log = log_of(options.results)
    waivers = read_waivers(options.waivers) if options.waivers is not None else ()
    report = recount(read_log(log), waivers, require_native=options.require_native)
    print(terminal(report), end="")
    if options.json is not None:
        write(options.json, json.dumps(report.to_json(), indent=1) + "\n")
    if options.markdown is not None:
        write(options.markdown, markdown(report))
    if options.headroom is not None:
        write(options.headroom, "\n".join([f"# Headroom of {report.subject}", "", *headroom(report.result), ""]))
    if options.html is not None:
        write(options.html, page(report))
    if options.bundle is not None:
        signer = None if options.sign is None else Signer.read(options.sign)
        kind = write_bundle(options.bundle, log, waivers, signer=signer, require_native=options.require_native)
        print(f"wrote {options.bundle}: a {kind}")
    return exit_code(report)


def _summary(place: Path) -> dict[str, Any]:
    """What a bundle states, or what a run's log leads to."""
    from polyaccel_conformance.certificate.bundle import SUMMARY, read_bundle, summary
    from polyaccel_conformance.certificate.recount import recount
    from polyaccel_conformance.log import read_log

    if place.is_dir() or place.suffix == ".jsonl":
        return summary(recount(read_log(log_of(place))))
    found: dict[str, Any] = read_bundle(place).json(SUMMARY)
    return found


def log_of(place: Path) -> Path:
    from polyaccel_conformance.runner import RESULTS

    return place / RESULTS if place.is_dir() else place


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
