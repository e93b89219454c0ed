"""docs/port-a-backend.md: every command on the page runs, in the order of the page, on the CPU."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.project.source import ROOT, code_blocks
from tests.support.plugins import TIMEOUT, environment, install_source

PAGE = ROOT / "docs" / "port-a-backend.md"
# What the page says -> what runs here: a few operators, few examples. Everything else is run as it is written.
SMALLER = {
    "run --backend acme --profile quick": "run --backend acme --profile quick --operators select_rows",
    "--profile quick --operators select_rows --operators silu_and_mul": "--profile quick --operators silu_and_mul",
    "--profile certify": "--profile quick --seed 1 --operators silu_and_mul,select_rows",
    "--rerun 200": "--rerun 20",
}
TESTS = ["-q", "-p", "no:cacheprovider", "-k", "preflight or select_rows"]


class Shell:
    """A vendor's terminal, with the current folder and what is installed."""

    def __init__(self, folder: Path) -> None:
        self._work, self.folder = folder, folder
        self.said = ""
        self._installs = 0
        self._variables: Mapping[str, str] = environment()

    def run(self, line: str) -> None:
        words = shlex.split(line)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
        elif words[:4] == ["python", "-m", "pip", "install"]:
            self.install()
        elif words == ["pytest"]:
            self._call([sys.executable, "-m", "pytest", *TESTS])
        else:
            assert words[0] == "polyaccel", line
            for written, small in SMALLER.items():
                line = line.replace(written, small)
            self._call([sys.executable, "-m", "polyaccel.cli.main", *shlex.split(line)[1:]])

    def install(self) -> None:
        """In place of an editable install, which would change the environment that the tests run in."""
        self._installs += 1
        work = self._work / f"install{self._installs}"
        site = install_source(self.folder, work, work / "site")
        variables = {**environment(site, cache=work / "cache"), "ACME_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        self._variables = variables

    def _call(self, command: list[str]) -> None:
        run = subprocess.run(
            command, cwd=self.folder, env=self._variables, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        self.said = run.stdout
        assert run.returncode == 0, f"{' '.join(command)}: {run.returncode}\n{run.stdout}{run.stderr}"


def with_native_operator(module: Path) -> None:
    """Put the page's two blocks of Python where it says: above the class, and into it."""
    (kernel,), (methods,) = code_blocks(PAGE, "python"), code_blocks(PAGE, "py")
    text = module.read_text(encoding="utf-8")
    head, _, rest = text.partition("class AcmeBackend(Backend):")
    body = rest[: rest.index("    def operators")]
    methods = textwrap.indent(textwrap.dedent(methods), "    ")
    module.write_text(f"{head}{kernel}\n\nclass AcmeBackend(Backend):{body}{methods}", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    blocks = code_blocks(PAGE, "sh")
    native = next(i for i, block in enumerate(blocks) if "--operators silu_and_mul" in block)
    for i, block in enumerate(blocks):
        if i == native:
            with_native_operator(shell.folder / "polyaccel_acme.py")
            shell.install()
        for line in block.splitlines():
            shell.run(line)
        if i == native:
            assert re.search(r"silu_and_mul +passed: \d+ cases \(\d+ native\)", shell.said), shell.said
    assert (shell.folder / "acme.html").is_file()
    assert shell.said.endswith("no difference\n")


def test_the_page_names_every_command_of_the_suite_that_a_vendor_needs() -> None:
    lines = [line for block in code_blocks(PAGE, "sh") for line in block.splitlines()]
    commands = {line.split()[2] for line in lines if line.startswith("polyaccel conformance ")}
    assert commands >= {"preflight", "run", "report", "verify"}
