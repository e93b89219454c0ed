"""``quick`` on every backend that is healthy, and on two that must not pass."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.results import RunResult
from tests.certify import backends
from tests.support.plugins import cli, environment

pytestmark = pytest.mark.slow

CASES = 3000
TIMEOUT = 600.0
NOTHING = f"{Path(__file__).with_name('subjects.py')}:Nothing"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> backends.Installed:
    return backends.Installed(tmp_path_factory.mktemp("installed"))


def quick(variables: Mapping[str, str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and error output of ``polyaccel conformance run --profile quick``."""
    words = ("conformance", "run", "--profile", "quick", "--no-progress", "--out", str(folder), *arguments)
    return cli(variables, *words, timeout=TIMEOUT)


@pytest.mark.parametrize("tested", backends.BACKENDS, ids=lambda tested: tested.name)
def test_a_healthy_backend_passes_quick(tested: backends.Tested, installed: backends.Installed, tmp_path: Path) -> None:
    code, out, err = quick(installed.variables(tested), tmp_path, "--backend", tested.name)
    assert code == ExitCode.PASS, out + err
    result = RunResult.from_json(json.loads((tmp_path / "result.json").read_text(encoding="utf-8")))
    assert result.cases >= CASES
    assert not result.failures
    assert not result.empty_cells
    # A continuous integration shows what passed as well.
    print(*re.findall(r"^PASS: .*$", out, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (("--backend", "null"), "FAIL  stores float32"),
        (("--table", NOTHING), "this backend does not support linear"),
    ],
    ids=["null", "nothing"],
)
def test_a_backend_that_computes_nothing_fails_with_the_reason(
    subject: tuple[str, str], reason: str, tmp_path: Path
) -> None:
    code, out, err = quick(environment(), tmp_path, *subject, "--operators", "linear", "--no-shrink")
    assert code == ExitCode.FAIL, out + err
    assert reason in out
