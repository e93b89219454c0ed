"""Imports go one way, stay within the declared dependencies, and `import polyaccel` loads little."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.project.source import ROOT, SUITE, Module, backend_modules, imports, modules, suite_modules

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
    "__main__": ("cli.main",),
}
LAZY = ("gguf", "jinja2", "stevedore", "tokenizers", "torch_npu", "transformers", "triton")
PARAMETERS = [pytest.param(module, id=module.name) for module in modules()]
SUITE_PARAMETERS = [pytest.param(module, id=module.name) for module in suite_modules()]
# What the suite may import besides the project's own dependencies: its extras, each in the one place that needs it.
EXTRAS = {
    f"{SUITE}.certificate.signature": {"cryptography"},
    f"{SUITE}.suite": {"pytest"},
    f"{SUITE}.mutation.unit": {"pytest"},
}
ENGINE = ("polyaccel.engine", "polyaccel.lora", "polyaccel.models", "polyaccel.weights", "polyaccel.cli")


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


def _of_suite(target: str, module: Module) -> bool:
    """Whether the suite's ``module`` may import ``target`` of polyaccel."""
    if target == "polyaccel" or target == "polyaccel.backend" or target.startswith("polyaccel.backend."):
        return True
    return module.package == "models" and not target.startswith("polyaccel.cli")


VENDORS = {
    "polyaccel_cuda": {"triton"},
    "polyaccel_npu": {"torch_npu"},
    # The simulator is a developer's tool, with a plugin for pytest.
    "polyaccel_cannsim": {"torch_npu", "pytest"},
}


@pytest.mark.parametrize("module", backend_modules(), ids=lambda m: m.name)
def test_a_backend_imports_the_contract_and_nothing_else_of_polyaccel(module: Module) -> None:
    own = module.name.split(".")[0]
    libraries = {"numpy", "torch", *VENDORS[own], *sys.stdlib_module_names}
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports(module)
        if found.target.split(".")[0] not in {own, *libraries} and not found.target.startswith("polyaccel.backend")
    ]
    assert not wrong, f"{module.name} imports more than the contract: {wrong}"


@pytest.mark.parametrize("module", SUITE_PARAMETERS)
def test_the_suite_imports_the_contract_alone_and_the_engine_for_whole_models_only(module: Module) -> None:
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports(module)
        if found.target.split(".")[0] == "polyaccel" and not _of_suite(found.target, module)
    ]
    assert not wrong, f"{module.name} imports more of polyaccel than the contract: {wrong}"


@pytest.mark.parametrize("module", SUITE_PARAMETERS)
def test_the_suite_imports_nothing_that_is_not_a_declared_dependency(module: Module) -> None:
    allowed = {"numpy", "torch", "hypothesis", "polyaccel", SUITE} | set(sys.stdlib_module_names)
    allowed |= EXTRAS.get(module.name, set())
    # Other projects' kernels: a table imports its project when the table is opened.
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports(module)
        if found.target.split(".")[0] not in allowed and module.package != "tables"
    ]
    assert not wrong, f"{module.name} imports what no extra declares: {wrong}"


@pytest.mark.parametrize("module", [m for m in suite_modules() if m.package == "oracle"], ids=lambda m: m.name)
def test_the_oracle_stands_alone(module: Module) -> None:
    """It imports neither torch nor anything of polyaccel: what it is compared with cannot have made it."""
    allowed = (f"{SUITE}.oracle", f"{SUITE}.formats")
    wrong = [
        f"line {found.line}: {found.target}"
        for found in imports(module)
        if found.target.split(".")[0] not in {"numpy", *sys.stdlib_module_names}
        and not found.target.startswith(allowed)
    ]
    assert not wrong, f"{module.name} is not independent: {wrong}"


def test_what_the_oracle_shares_with_torch_is_a_table_of_formats() -> None:
    (formats,) = [module for module in suite_modules() if module.name == f"{SUITE}.formats"]
    assert {found.target.split(".")[0] for found in imports(formats)} <= {
        "__future__",
        "dataclasses",
        "types",
        "numpy",
        "torch",
    }


def _loaded(program: str) -> list[str]:
    """The modules of polyaccel's engine that a fresh interpreter has after ``program``."""
    code = f"import sys; {program}; print(*[n for n in sys.modules if n.startswith({ENGINE!r})])"
    path = os.pathsep.join((str(ROOT), str(ROOT / "conformance")))
    variables = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, check=True, capture_output=True, text=True
    )
    return run.stdout.split()


def test_the_suite_and_its_command_load_without_the_engine() -> None:
    names = ("cli.main", "cli.run", "cli.replay", "checks.registry", "problems.registry", "multi.registry")
    program = "; ".join(f"import {SUITE}.{name}" for name in (*names, "workers.worker", "tables.torch_eager"))
    assert _loaded(program) == []
    assert "polyaccel.engine.philox" in _loaded("import polyaccel.engine.philox")
