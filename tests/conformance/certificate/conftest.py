"""A small whole run, made once: every case of two operators, executed in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyaccel_conformance.certificate.bundle import write_bundle
from tests.conformance.certificate.small_run import write_log


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results log of a run that earns L0 and nothing else."""
    path = tmp_path_factory.mktemp("run") / "results.jsonl"
    write_log(path)
    return path


@pytest.fixture(scope="session")
def certificate(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle. Not to be changed."""
    path = tmp_path_factory.mktemp("bundle") / "cpu.tar.xz"
    write_bundle(path, log)
    return path
