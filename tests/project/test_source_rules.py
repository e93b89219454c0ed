"""Rules that every source file keeps: size, names, safety, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import re
from urllib.parse import urlsplit

import pytest

from tests.project.module_state import state
from tests.project.source import ROOT, SUITE, Module, calls, imports, modules, suite_modules, text_files

LINES = 500
PARAMETERS = [pytest.param(module, id=module.name) for module in (*modules(), *suite_modules())]
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
    wrong = list(state(module.tree()))
    assert not wrong, f"{module.name} holds state that two engines would share: {wrong}"


@pytest.mark.parametrize("module", PARAMETERS)
def test_only_the_cli_prints(module: Module) -> None:
    # The functions of one module are written into the script that a kernel team gets.
    prints = module.package == "cli" or module.name == f"{SUITE}.standalone" or module.name.endswith(".__main__")
    lines = [line for name, line in calls(module) if name == "print"]
    assert prints or not lines, f"{module.name} prints on lines {lines}: log, or return the text"


@pytest.mark.parametrize("module", PARAMETERS)
def test_nothing_evaluates_text_or_unpickles_a_checkpoint(module: Module) -> None:
    banned = {"eval", "exec", "torch.load", "__import__"}
    wrong = [f"line {line}: {name}" for name, line in calls(module) if name in banned]
    if module.package in READERS and not module.is_suite:
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


@pytest.mark.parametrize(
    "text",
    [
        "SEEN = {}",
        "SEEN: dict[str, int] = dict()",
        "import weakref\nSEEN = weakref.WeakValueDictionary()",
        "import threading\nLOCAL = threading.local()",
        "import itertools\nNEXT = itertools.count()",
        "SEEN = {1: 2}\ndef f():\n    SEEN[3] = 4",
        "SEEN = [1]\ndef f():\n    SEEN.append(2)",
        "from other import TABLE\ndef f():\n    TABLE.update(a=1)",
        "from other import TABLE\ndef f():\n    del TABLE['a']",
        "N = 0\ndef f():\n    global N\n    N += 1",
        "class C:\n    seen = []",
    ],
)
def test_state_of_a_module_is_found(text: str) -> None:
    assert list(state(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "TABLE = {1: 2}\ndef f(x):\n    return TABLE[x]",
        "TABLE = (1, 2)",
        "def f():\n    seen = []\n    seen.append(1)\n    return seen",
        "SEEN = (1,)\ndef f(SEEN):\n    SEEN.append(2)",
    ],
)
def test_what_is_constant_or_local_is_no_state(text: str) -> None:
    assert not list(state(ast.parse(text)))
