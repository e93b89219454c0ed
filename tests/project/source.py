"""What the project's own tests read: module names, syntax trees, imports, tracked files, stored snapshots."""

from __future__ import annotations

import ast
import difflib
import functools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = "polyaccel_conformance"
UPDATE_VARIABLE = "POLYACCEL_UPDATE_SNAPSHOTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One source file. ``package`` is the first name below ``polyaccel`` or ``polyaccel_conformance``, empty for the
    top."""

    name: str
    path: Path

    @property
    def is_suite(self) -> bool:
        """Whether it is the conformance suite's."""
        return self.name.split(".")[0] == SUITE

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def package(self) -> str:
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""

    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))

    def summary(self) -> str:
        """The first sentence of the module's docstring, on one line; empty without a docstring."""
        paragraph = (ast.get_docstring(self.tree()) or "").split("\n\n")[0]
        return " ".join(paragraph.split()).split(". ")[0].removesuffix(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name, absolute: ``from polyaccel.lora import target`` gives ``polyaccel.lora.target``."""

    target: str
    line: int


def modules() -> list[Module]:
    """Every module of the package, sorted by name."""
    return _modules_below(ROOT, "polyaccel")


def suite_modules() -> list[Module]:
    """Every module of the conformance suite, sorted by name."""
    return _modules_below(ROOT / "conformance", SUITE)


def backend_modules() -> list[Module]:
    """Every module of the backends that come with the project, sorted by name."""
    return [
        m for folder in sorted((ROOT / "backends").iterdir()) for m in _modules_below(ROOT / "backends", folder.name)
    ]


def _modules_below(root: Path, package: str) -> list[Module]:
    found = []
    for path in (root / package).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name=name, path=path))
    return sorted(found, key=lambda module: module.name)


@functools.cache
def _module_names() -> frozenset[str]:
    return frozenset(module.name for module in (*modules(), *suite_modules(), *backend_modules()))


def imports(module: Module) -> Iterator[Import]:
    """Every import in the module, at any depth, those for type checking and imports by a literal name included."""
    names = _module_names()
    for node in ast.walk(module.tree()):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(target=alias.name, line=node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(target=full if full in names else base, line=node.lineno)
        elif isinstance(node, ast.Call) and _called_name(node) in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(target=first.value, line=node.lineno)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    drop = node.level - 1 if module.is_package else node.level
    return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])


def _called_name(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def calls(module: Module) -> Iterator[tuple[str, int]]:
    """(dotted name as written, line) of every call whose target is a plain or dotted name."""
    for node in ast.walk(module.tree()):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node.lineno


def text_files() -> list[tuple[Path, str]]:
    """Every text file that is, or would be, committed, with its text."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    found = []
    for name in sorted(filter(None, listed.decode().split("\0"))):
        path = ROOT / name
        if not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        data = path.read_bytes()
        if b"\0" not in data:
            found.append((path, data.decode()))
    return found


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language in a Markdown page."""
    blocks: list[list[str]] = []
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("```"):
            if not inside and line.strip() == f"```{language}":
                blocks.append([])
                inside = True
            else:
                inside = False
        elif inside:
            blocks[-1].append(line)
    return ["\n".join(block) + "\n" for block in blocks]


def compare_with_stored(path: Path, actual: str, stored: str, updated: str) -> None:
    """Fail with a diff where ``actual`` differs from ``stored``; write ``updated`` to ``path`` when asked to update."""
    if actual == stored:
        return
    if os.environ.get(UPDATE_VARIABLE):
        path.write_text(updated, encoding="utf-8")
        return
    diff = difflib.unified_diff(stored.splitlines(), actual.splitlines(), "stored", "actual", lineterm="")
    name = path.relative_to(ROOT)
    raise AssertionError(
        f"{name} is out of date. If the change is meant: {UPDATE_VARIABLE}=1 pytest tests/project\n" + "\n".join(diff)
    )
