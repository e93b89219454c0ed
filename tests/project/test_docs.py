"""The documentation agrees with the code: modules, operators, errors, examples, changelog."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import polyaccel
from polyaccel.backend import errors
from polyaccel.cli.main import build_parser
from polyaccel_conformance.certificate.bundle import MANIFEST, SUMMARY, manifest, read_bundle
from polyaccel_conformance.cli.main import COMMANDS as SUITE_COMMANDS
from polyaccel_conformance.cli.main import build_parser as build_suite_parser
from polyaccel_conformance.report.support import support
from tests.certify.stages import LARGEST
from tests.project.figures import engine_tables, invariance_table, peer_tables, shape_table, speed_tables
from tests.project.metadata import project
from tests.project.pages import level_tables, module_list, operator_tables, parameter_tables
from tests.project.source import ROOT, code_blocks, compare_with_stored

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(code_blocks(page, "python"), 1)
]
SHELL = [line for page in PAGES for block in code_blocks(page, "sh") for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith("polyaccel ")]


@pytest.mark.parametrize(
    ("page", "subject", "render"),
    [
        ("architecture.md", "modules", module_list),
        ("contract.md", "operators", operator_tables),
        ("levels.md", "levels", level_tables),
        ("parameters.md", "parameters", parameter_tables),
        ("../README.md", "speed", speed_tables),
        ("../README.md", "GPU speed", peer_tables),
        ("cuda.md", "decode", engine_tables),
        ("cuda.md", "peers", peer_tables),
        ("cuda.md", "shapes", shape_table),
        ("cuda.md", "cost", invariance_table),
    ],
    ids=["architecture", "contract", "levels", "parameters", "speed", "gpu-speed", "decode", "peers", "shapes", "cost"],
)
def test_a_generated_list_agrees_with_the_code(page: str, subject: str, render: Callable[[], str]) -> None:
    path = ROOT / "docs" / page
    begin, end = f"<!-- {subject}: written by tests/project -->\n", f"<!-- end of {subject} -->"
    head, rest = path.read_text(encoding="utf-8").split(begin)
    stored, tail = rest.split(end)
    actual = f"\n{render()}\n"
    compare_with_stored(path, actual, stored, head + begin + actual + end + tail)


def test_the_errors_page_names_every_error() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    names = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_compiles_and_uses_names_that_exist(block: str) -> None:
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "polyaccel":
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "polyaccel":
            assert node.attr in polyaccel.__all__


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_line_is_accepted(command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "conformance":
        # The suite has a command line of its own.
        assert build_suite_parser().parse_args(words[1:]).command == words[1]
        return
    assert build_parser().parse_args(words).command == words[0]


def test_the_page_of_the_command_line_names_every_command_of_the_suite() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in SUITE_COMMANDS if f"| `{name}` |" not in text] == []


def test_the_support_page_is_what_the_certificates_say() -> None:
    bundles = [read_bundle(path) for path in sorted((ROOT / "docs" / "certificates").glob("*.tar.xz"))]
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == support(bundles)


def test_every_committed_certificate_is_one_and_small() -> None:
    for path in sorted((ROOT / "docs" / "certificates").glob("*.tar.xz")):
        bundle = read_bundle(path)
        assert bundle.json(SUMMARY)["kind"] == "certificate", path.name
        assert bundle.files[MANIFEST] == manifest({n: d for n, d in bundle.files.items() if n != MANIFEST}), path.name
        assert path.stat().st_size <= LARGEST


def test_the_examples_of_the_backend_page_run() -> None:
    names: dict[str, object] = {}
    for block in code_blocks(ROOT / "docs" / "backends.md", "python"):
        exec(compile(block, "docs/backends.md", "exec"), names)
    mine = names["MyBackend"]
    assert isinstance(mine, type)
    assert mine().probe().usable


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if Path("docs") in page.relative_to(ROOT).parents]
    assert [page for page in pages if f": {page}" not in text] == []


def test_the_changelog_begins_with_this_version_or_with_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## \[?([^\]\s]+)", text, flags=re.MULTILINE)
    assert first is not None
    assert first.group(1) in {"Unreleased", project()["version"]}


def test_the_first_screen_of_the_readme_holds_the_two_commands() -> None:
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    for wanted in (
        "python -m pip install tox && tox -e demo",
        "python -m pip install tox && tox\n",
        "In a virtual environment (`python3 -m venv .venv && . .venv/bin/activate`;",
        "Debian and Ubuntu refuse otherwise)",
    ):
        assert wanted in screen
