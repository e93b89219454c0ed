"""The metadata files agree with one another: ranges in pyproject.toml, exact pins in constraints.txt."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.project.metadata import constraints, project, pyproject
from tests.project.source import ROOT


def _grouped() -> list[str]:
    return [text for group in pyproject()["dependency-groups"].values() for text in group]


def _requirements() -> list[Requirement]:
    texts = {*project()["dependencies"], *project()["optional-dependencies"]["dev"], *_grouped()}
    return [Requirement(text) for text in sorted(texts)]


def test_constraints_are_exact_pins_and_torch_comes_first() -> None:
    pins = constraints()
    assert next(iter(pins)) == "torch"
    assert [str(pin) for pin in pins.values() if not re.fullmatch(r"==[\w.]+", str(pin.specifier)) or pin.url] == []


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_every_requirement_is_a_range_that_its_pin_satisfies(requirement: Requirement) -> None:
    pin = constraints()[canonicalize_name(requirement.name)]
    (exact,) = pin.specifier
    assert requirement.specifier.contains(exact.version), f"{pin} is outside {requirement}"
    assert all(clause.operator != "==" for clause in requirement.specifier), "exact pins live in constraints.txt"


def test_the_dev_extra_is_all_groups_with_tox_and_pre_commit() -> None:
    dev = set(project()["optional-dependencies"]["dev"])
    assert dev - set(_grouped()) == {"pre-commit>=4", "tox>=4.67"}
    assert set(_grouped()) <= dev


def test_pre_commit_runs_ruff_at_the_pinned_version() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==[\d.]+", text)) == {str(constraints()["ruff"])}


def test_every_built_in_backend_states_its_api_range() -> None:
    groups = project()["entry-points"]
    assert groups["polyaccel.backends"].keys() == groups["polyaccel.backend_api"].keys()


@pytest.mark.parametrize(("name", "target"), project()["entry-points"]["polyaccel.backends"].items())
def test_a_built_in_backend_can_be_loaded(name: str, target: str) -> None:
    entry_point = importlib.metadata.EntryPoint(name=name, value=target, group="polyaccel.backends")
    assert isinstance(entry_point.load(), type)


def test_tox_has_an_environment_for_every_chore_and_at_most_four_with_torch() -> None:
    text = (ROOT / "tox.ini").read_text(encoding="utf-8")
    assert "env_list = lint, types, py, triton, npu-sim, docs, packaging, conformance" in text
    assert 1 <= len(re.findall(r"^skip_install = false$", text, flags=re.MULTILINE)) <= 4
