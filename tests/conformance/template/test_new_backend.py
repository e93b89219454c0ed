"""``polyaccel new-backend``: what it writes is small, valid, installs as a wheel, and passes the suite on the CPU."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.template.files import FILES
from polyaccel_conformance.template.write import write_package
from tests.support.plugins import cli, environment, install_source


def test_the_files_are_filled_in_and_parse(tmp_path: Path) -> None:
    written = write_package("acme-two", "privateuseone", tmp_path / "new")
    assert len(written) == len(FILES)
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert "@" not in text.replace("actions/checkout@v4", "").replace("actions/setup-python@v5", "")
        if path.suffix == ".py":
            ast.parse(text)
    module = tmp_path / "new" / "polyaccel_acme_two.py"
    assert len(module.read_text(encoding="utf-8").splitlines()) < 60
    project = tomllib.loads((tmp_path / "new" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["polyaccel.backends"] == {"acme-two": "polyaccel_acme_two:AcmeTwoBackend"}
    assert project["entry-points"]["polyaccel.backend_api"] == {"acme-two": "v1_0:v1_0"}


@pytest.mark.parametrize("name", ["", "Acme", "acme ", "1acme", "acme/../x", "a--b", "cpu", "auto"])
def test_a_name_that_cannot_be_a_backends_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="backend name"):
        write_package(name, "cuda", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_device_with_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without an index"):
        write_package("acme", "cuda:0", tmp_path / "new")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="not empty"):
        write_package("acme", "cuda", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The generated package's folder, and variables under which Python sees it installed on the CPU."""
    work = tmp_path_factory.mktemp("new")
    code, out, err = cli(environment(), "new-backend", "acme", "--device", "cuda", "--folder", str(work / "package"))
    assert code == 0, out + err
    site = install_source(work / "package", work, work / "site")
    return work / "package", {**environment(site, cache=work / "cache"), "ACME_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}


def test_it_installs_as_a_wheel_and_is_listed(installed: tuple[Path, dict[str, str]]) -> None:
    code, out, err = cli(installed[1], "backends")
    assert code == 0, err
    (row,) = [line for line in out.splitlines() if "acme" in line]
    assert row.startswith("PASS")


def test_it_says_why_it_cannot_be_used_without_its_device(installed: tuple[Path, dict[str, str]]) -> None:
    variables = {**installed[1], "ACME_DEVICE": "privateuseone"}
    code, out, _ = cli(variables, "conformance", "preflight", "--backend", "acme")
    assert code == 1
    assert "torch has no usable device 'privateuseone'" in out


def test_its_preflight_passes_on_the_cpu(installed: tuple[Path, dict[str, str]]) -> None:
    code, out, err = cli(installed[1], "conformance", "preflight", "--backend", "acme")
    assert code == 0, out + err
    assert "none of " in out


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_it_passes_quick_on_the_cpu_and_earns_levels(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """The whole profile: every operator, as a composite."""
    words = ["conformance", "run", "--backend", "acme", "--profile", "quick", "--no-progress", "--out", str(tmp_path)]
    code, out, err = cli(installed[1], *words, timeout=900)
    assert code == 0, out + err
    assert out.startswith("preflight passed in ")
    rows = [line.split() for line in out.splitlines()]
    for level in ("L0", "L1", "L2", "L3", "L4", "L5"):
        (row,) = [words for words in rows if words[:1] == [level]]
        assert "granted" in row, out
        assert "not" not in row, out


@pytest.mark.slow
def test_its_own_test_file_passes(installed: tuple[Path, dict[str, str]]) -> None:
    folder, variables = installed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "preflight or select_rows"]
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
