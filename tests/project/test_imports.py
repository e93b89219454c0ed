"""Imports go one way, stay within the declared dependencies, and `import polyaccel` loads little."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.project.source import ROOT, Module, imports, modules

# Package -> packages (or single modules) below polyaccel that it may import, besides itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "": ("backend", "engine", "lora", "models", "observe", "weights"),
    "backend": (),
    "observe": ("backend",),
    "quant": ("backend",),
    "parallel": ("backend", "observe"),
    "weights": ("backend", "observe", "quant"),
    "lora": ("backend", "observe", "parallel", "weights"),
    "models": ("backend", "lora.target", "parallel.cut", "weights.checkpoint"),
    "engine": ("backend", "lora", "models", "observe", "parallel", "quant", "weights"),
    "cli": ("", "backend", "engine", "observe"),
}
LAZY = ("gguf", "jinja2", "stevedore", "tokenizers", "torch_npu", "transformers", "triton")
PARAMETERS = [pytest.param(module, id=module.name) for module in modules()]


def _is_allowed(module: Module, target: str) -> bool:
    below = target.removeprefix("polyaccel").removeprefix(".")
    if below == "" or below.startswith("_"):
        return module.package == "" or "" in ALLOWED[module.package]
    if below.split(".")[0] == module.package:
        return True
    return any(allowed and (below == allowed or below.startswith(f"{allowed}.")) for allowed in ALLOWED[module.package])


@pytest.mark.parametrize("module", PARAMETERS)
def test_a_module_imports_only_from_the_layers_below_it(module: Module) -> None:
    assert module.is_package or module.package in ALLOWED, f"{module.name}: give its package a layer in this test"
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports(module)
        if found.target.split(".")[0] == "polyaccel" and not _is_allowed(module, found.target)
    ]
    assert not wrong, f"{module.name} imports upward or sideways: {wrong}"


@pytest.mark.parametrize("module", PARAMETERS)
def test_a_module_imports_nothing_that_is_not_a_declared_dependency(module: Module) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = {Requirement(text).name for text in tomllib.load(file)["project"]["dependencies"]}
    allowed = declared | set(sys.stdlib_module_names) | {"polyaccel"}
    if module.package == "cli":
        # Its commands are part of the same distribution and are imported when they are asked for.
        allowed |= {"polyaccel_conformance"}
    wrong = [
        f"line {found.line}: {found.target}" for found in imports(module) if found.target.split(".")[0] not in allowed
    ]
    assert not wrong, f"{module.name} imports what pyproject.toml does not declare: {wrong}"


def test_every_declared_dependency_is_imported_somewhere() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = {Requirement(text).name for text in tomllib.load(file)["project"]["dependencies"]}
    used = {found.target.split(".")[0] for module in modules() for found in imports(module)}
    assert declared <= used, f"declared but never imported: {sorted(declared - used)}"


def test_importing_polyaccel_loads_neither_tokenizers_nor_any_vendor_module() -> None:
    program = f"import polyaccel, sys; print(*[name for name in {LAZY!r} if name in sys.modules])"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    # What importing torch alone brings in is not ours to avoid.
    command[-1] = program.replace("import polyaccel", "import torch")
    by_torch = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert sorted(set(loaded) - set(by_torch)) == []
