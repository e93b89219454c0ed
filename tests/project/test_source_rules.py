"""Rules that every source file keeps: size, names, safety, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import re
from urllib.parse import urlsplit

import pytest

from tests.project.source import ROOT, Module, calls, imports, modules, text_files

LINES = 500
PARAMETERS = [pytest.param(module, id=module.name) for module in modules()]
# Packages that read files which other people wrote.
READERS = {"lora", "models", "quant", "weights"}
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
MACHINE_PATH = re.compile(rf"(?<![\w.~>/:-])/(?:{'|'.join(('work', 'root', 'home', 'tmp', 'Users'))})/\w")
MARKER = re.compile(rf"\b(?:{'|'.join(('TO' + 'DO', 'FIX' + 'ME', 'X' + 'XX', 'HA' + 'CK'))})\b")
# The only hosts that a file may name. A package index is configuration of the reader's machine, never of this project.
HOSTS = {"", "127.0.0.1", "localhost", "arxiv.org", "github.com", "huggingface.co", "www.apache.org"}
URL = re.compile(r"https?://[^\s\"'<>()\]`]+")


@pytest.mark.parametrize("module", PARAMETERS)
def test_a_module_has_at_most_500_lines(module: Module) -> None:
    count = len(module.path.read_text(encoding="utf-8").splitlines())
    assert count <= LINES, f"{module.name} has {count} lines, {LINES} are allowed: one noun a file"


@pytest.mark.parametrize("module", PARAMETERS)
def test_a_module_says_what_it_is_for(module: Module) -> None:
    assert module.summary(), f"{module.name} has no docstring"


@pytest.mark.parametrize("module", PARAMETERS)
def test_a_module_postpones_its_annotations(module: Module) -> None:
    tree = module.tree()
    annotated = any(isinstance(node, ast.AnnAssign | ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))
    first = next((ast.unparse(node) for node in tree.body if not isinstance(node, ast.Expr)), "")
    wanted = "from __future__ import annotations"
    assert not annotated or first == wanted, f"{module.name} does not begin with `{wanted}`"


@pytest.mark.parametrize("module", PARAMETERS)
def test_a_module_keeps_no_global_state(module: Module) -> None:
    tree = module.tree()
    wrong = [f"line {node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_empty(node.value):
            wrong.append(f"line {node.lineno}: an empty container, to be filled later")
    assert not wrong, f"{module.name} holds state that two engines would share: {wrong}"


def _is_empty(value: ast.expr) -> bool:
    return ast.unparse(value) in {"[]", "{}", "set()", "dict()", "list()", "OrderedDict()", "defaultdict(list)"}


@pytest.mark.parametrize("module", PARAMETERS)
def test_only_the_cli_prints(module: Module) -> None:
    lines = [line for name, line in calls(module) if name == "print"]
    assert module.package == "cli" or not lines, f"{module.name} prints on lines {lines}: log, or return the text"


@pytest.mark.parametrize("module", PARAMETERS)
def test_nothing_evaluates_text_or_unpickles_a_checkpoint(module: Module) -> None:
    banned = {"eval", "exec", "torch.load", "__import__"}
    wrong = [f"line {line}: {name}" for name, line in calls(module) if name in banned]
    if module.package in READERS:
        wrong += [f"line {found.line}: {found.target}" for found in imports(module) if found.target in PICKLERS]
    assert not wrong, f"{module.name} could run what a checkpoint says: {wrong}"


def _hits(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        for match in pattern.finditer(line)
    ]


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    assert _hits(MACHINE_PATH) == []


def test_no_file_promises_work_for_later() -> None:
    assert _hits(MARKER) == []


def test_no_file_names_a_host_outside_the_list() -> None:
    wrong = [hit for hit in _hits(URL) if urlsplit(hit.split(": ", 1)[1]).hostname not in HOSTS]
    assert wrong == []


def test_every_package_below_polyaccel_has_tests() -> None:
    packages = {module.package for module in modules() if module.package and len(module.name.split(".")) > 2}
    tested = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert packages - tested == set()


def test_the_file_patterns_find_what_they_should() -> None:
    slash = "/"
    assert MACHINE_PATH.search(f"see {slash}home{slash}someone")
    assert not MACHINE_PATH.search(f"docs{slash}home{slash}page")
    assert MARKER.search("# TO" + "DO: later")
    assert URL.findall("(http://localhost:80/x)") == ["http://localhost:80/x"]
