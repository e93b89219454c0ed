"""Installed plugins: what is found, what is refused and how, and what is never imported."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.plugins import PluginHouse, cli, environment, python

LOAD = """
import sys
from polyaccel.backend import BackendUnavailable, registry
for name in sys.argv[1:]:
    try:
        backend = registry.choose(name)
        print(f"{name}: {type(backend).__module__}.{type(backend).__qualname__} {backend.name}")
    except BackendUnavailable as error:
        print(f"{name}: refused: {error} | cause: {error.__cause__!r}")
"""
ALL = ("example_backend", "broken_import", "incompatible_api", "no_api_range", "marks_import")


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    return tmp_path / "marks"


def _imported(marks: Path) -> list[str]:
    return marks.read_text(encoding="utf-8").split() if marks.exists() else []


def _load(variables: Mapping[str, str], *names: str) -> dict[str, str]:
    answers = python(LOAD, variables, *names).splitlines()
    return {name: answer.removeprefix(f"{name}: ") for name, answer in zip(names, answers, strict=True)}


@pytest.fixture(scope="module")
def answers(plugin_house: PluginHouse, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What asking for each of these names gives, where all plugins are installed; ``imported`` is what it imported."""
    folder = tmp_path_factory.mktemp("answers")
    variables = environment(plugin_house.site(*ALL), cache=folder, marks=folder / "marks")
    found = _load(variables, "example", "null", "broken", "incompatible", "rangeless", "cuba")
    return {**found, "imported": " ".join(_imported(folder / "marks"))}


def test_a_plugin_that_was_not_chosen_is_never_imported(
    plugin_house: PluginHouse, tmp_path: Path, marks: Path, answers: dict[str, str]
) -> None:
    assert answers["example"] == "polyaccel_example_backend.ExampleBackend example"
    assert answers["null"].endswith("NullBackend null")
    assert answers["imported"] == ""
    variables = environment(plugin_house.site(*ALL), cache=tmp_path, marks=marks)
    assert _load(variables, "marks")["marks"].startswith("polyaccel_marks_import.MarkingBackend")
    assert _imported(marks) == ["polyaccel_marks_import"]


def test_a_plugin_that_cannot_be_imported_is_named_with_its_distribution_target_and_cause(
    answers: dict[str, str],
) -> None:
    for part in (
        "polyaccel-broken-import 1.0.0",
        "polyaccel_broken_import:BrokenBackend",
        "ImportError: libexample_driver.so.2",
        'backend="cpu"',
        "cause: ImportError('libexample_driver",
    ):
        assert part in answers["broken"], answers["broken"]


def test_an_api_range_that_excludes_this_version_is_refused_without_an_import(answers: dict[str, str]) -> None:
    assert "polyaccel-incompatible-api 1.0.0" in answers["incompatible"]
    assert "API v9_0:v9_9" in answers["incompatible"]
    assert re.search(r"this is API 1\.\d+", answers["incompatible"])
    assert answers["imported"] == ""


def test_a_missing_api_range_is_refused_with_the_line_to_add_and_without_an_import(answers: dict[str, str]) -> None:
    assert "polyaccel-no-api-range 1.0.0" in answers["rangeless"]
    assert '[project.entry-points."polyaccel.backend_api"] rangeless = "v1_0:v1_0"' in answers["rangeless"]
    assert answers["imported"] == ""


def test_an_unknown_name_lists_what_is_installed(answers: dict[str, str]) -> None:
    assert "no backend 'cuba'" in answers["cuba"]
    for name in ("cpu", "null", "example", "broken"):
        assert f"'{name}'" in answers["cuba"]


def test_two_distributions_with_one_name_are_refused_naming_both_and_spare_the_others(
    plugin_house: PluginHouse, tmp_path: Path, marks: Path
) -> None:
    site = plugin_house.site("example_backend", "duplicate_name", "marks_import")
    answers = _load(environment(site, cache=tmp_path, marks=marks), "example", "marks", "auto")
    for name in ("example", "auto"):
        assert "polyaccel-example-backend 1.0.0 (polyaccel_example_backend:ExampleBackend)" in answers[name]
        assert "polyaccel-duplicate-name 1.0.0 (polyaccel_duplicate_name:DuplicateBackend)" in answers[name]
    assert answers["marks"].startswith("polyaccel_marks_import.MarkingBackend")
    assert "polyaccel_duplicate_name" not in _imported(marks)


def test_auto_refuses_to_pass_over_a_broken_plugin(plugin_house: PluginHouse, tmp_path: Path, marks: Path) -> None:
    variables = environment(plugin_house.site("broken_import"), cache=tmp_path, marks=marks)
    assert "polyaccel-broken-import 1.0.0" in _load(variables, "auto")["auto"]


def test_auto_never_takes_the_null_backend(plugin_house: PluginHouse, tmp_path: Path, marks: Path) -> None:
    variables = environment(plugin_house.site("example_backend", "marks_import"), cache=tmp_path, marks=marks)
    assert _load(variables, "auto")["auto"].endswith("CpuBackend cpu")


def test_the_list_of_backends_has_a_row_for_each_and_survives_all_of_them(
    plugin_house: PluginHouse, tmp_path: Path, marks: Path
) -> None:
    variables = environment(plugin_house.site(*ALL, "duplicate_name"), cache=tmp_path, marks=marks)
    code, out, err = cli(variables, "backends")
    assert code == 0, err
    verdicts = {line.split()[1]: line for line in out.splitlines()}
    passed = {name for name, line in verdicts.items() if line.startswith("PASS")}
    failed = {name for name, line in verdicts.items() if line.startswith("FAIL")}
    assert {"null", "marks"} <= passed
    # cuda and npu pass where there is a card.
    assert failed - {"cuda", "npu"} == {"broken", "incompatible", "rangeless", "example"}
    assert "libexample_driver.so.2" in verdicts["broken"]
    assert "v9_0:v9_9" in verdicts["incompatible"]
    assert 'rangeless = "v1_0:v1_0"' in verdicts["rangeless"]
    assert sum(line.split()[1] == "example" for line in out.splitlines()) == 2
    assert set(_imported(marks)) == {"polyaccel_marks_import"}
    rows = json.loads(cli(variables, "backends", "--json")[1])
    assert {row["name"] for row in rows if not row["usable"]} == failed
    assert all(row["reason"] for row in rows if not row["usable"])


REPLACED = """
import pathlib, sys
from polyaccel.backend import registry
from stevedore.driver import DriverManager
backend = registry.load("example")
print(type(backend).__name__, "replaced" in sys.modules)
print(DriverManager("polyaccel.backends", "example").driver.__name__)
"""


def test_a_plugin_replaced_in_place_is_loaded_as_it_is_now(
    plugin_house: PluginHouse, tmp_path: Path, marks: Path
) -> None:
    site = plugin_house.fresh_site(tmp_path / "site", "example_backend")
    variables = environment(site, cache=tmp_path / "cache", marks=marks)
    assert python(REPLACED, variables).split() == ["ExampleBackend", "False", "ExampleBackend"]
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    times = {path: path.stat().st_mtime_ns for path in (site, entry_points)}
    (site / "replaced.py").write_text(
        "from polyaccel_example_backend import ExampleBackend\nclass ReplacedBackend(ExampleBackend): ...\n",
        encoding="utf-8",
    )
    text = entry_points.read_text(encoding="utf-8")
    changed = text.replace("polyaccel_example_backend:ExampleBackend", "replaced:ReplacedBackend")
    entry_points.write_text(changed, encoding="utf-8")
    # Seconds apart is equal in the cache's key, whose time stamps are float32; equal here, whatever the clock says.
    for path, nanoseconds in times.items():
        os.utime(path, ns=(nanoseconds, nanoseconds))
    loaded, imported, from_stevedore = python(REPLACED, variables).split()
    assert (loaded, imported) == ("ReplacedBackend", "True")
    if not sys.executable.startswith("/" + "tmp"):
        # Without a stale answer this would be no test; stevedore keeps no cache for an interpreter that lies there.
        assert from_stevedore == "ExampleBackend"
