"""Wheel, sdist and editable installs hold what they should and nothing else, each alone in an environment."""

from __future__ import annotations

import email
import importlib.metadata
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.overlay import PIP, ROOT, Overlay, build, copy_sources, create, link_dependencies, run
from tests.project.metadata import constraints, project

PROBE = """
import importlib, importlib.metadata, importlib.resources, json, pkgutil
import polyaccel
names = [found.name for found in pkgutil.walk_packages(polyaccel.__path__, "polyaccel.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
groups = {
    group: {point.name: point.value for point in importlib.metadata.entry_points(group=group)}
    for group in ("polyaccel.backends", "polyaccel.backend_api")
}
print(json.dumps({
    "file": polyaccel.__file__,
    "modules": names,
    "groups": groups,
    "typed": importlib.resources.files("polyaccel").joinpath("py.typed").is_file(),
    "version": importlib.metadata.version("polyaccel"),
    "distributions": [one.metadata["Name"] for one in importlib.metadata.distributions()].count("polyaccel"),
}))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def source(work: Path) -> Path:
    return copy_sources(work / "source")


@pytest.fixture(scope="module")
def built(work: Path, source: Path) -> tuple[Path, Path]:
    return build(source, work / "built")


@pytest.fixture(scope="module")
def dependencies(work: Path) -> Path:
    return link_dependencies(work / "dependencies")


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def overlay(
    request: pytest.FixtureRequest, work: Path, source: Path, built: tuple[Path, Path], dependencies: Path
) -> Overlay:
    sdist, wheel = built
    requirement = {"wheel": wheel, "sdist": sdist, "editable": source}[request.param]
    return create(request.param, requirement, dependencies, work / request.param)


@pytest.fixture(scope="module")
def probe(overlay: Overlay) -> dict[str, object]:
    found: dict[str, object] = json.loads(overlay.run("python", "-I", "-c", PROBE))
    return found


def test_every_module_is_imported_from_this_install(overlay: Overlay, probe: dict[str, object]) -> None:
    place = overlay.source if overlay.kind == "editable" else overlay.site
    assert Path(str(probe["file"])).resolve().is_relative_to(place.resolve())
    assert probe["distributions"] == 1
    wanted = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "polyaccel").rglob("*.py")
    }
    assert set(probe["modules"]) | {"polyaccel"} == wanted  # type: ignore[call-overload]


def test_the_version_and_the_entry_points_are_those_of_pyproject(probe: dict[str, object]) -> None:
    points = project()["entry-points"]
    assert probe["groups"] == {group: dict(points[group]) for group in ("polyaccel.backends", "polyaccel.backend_api")}
    assert probe["version"] == project()["version"]


def test_the_type_marker_is_installed(probe: dict[str, object]) -> None:
    assert probe["typed"] is True


def test_the_console_script_lists_the_built_in_backends(overlay: Overlay) -> None:
    assert "backends" in overlay.run("polyaccel", "--help")
    lines = overlay.run("polyaccel", "backends").splitlines()
    # What needs hardware passes where it is, and says what is missing where it is not.
    missing = {"npu": "torch_npu is not installed: python -m pip install 'polyaccel[npu]'"}
    if not torch.cuda.is_available():
        missing["cuda"] = "torch finds no CUDA device"
    for name in project()["entry-points"]["polyaccel.backends"]:
        said = missing.get(name, "PASS")
        assert [line for line in lines if name in line.split() and said in line], f"no {said!r} row for {name}: {lines}"


def test_the_simulators_command_is_installed_and_needs_no_torch_npu_to_explain_itself(overlay: Overlay) -> None:
    assert "--soc" in overlay.run("polyaccel-cannsim", "run", "--help")
    assert "aclnnMatmulAllReduce" in overlay.run("polyaccel-cannsim", "show")


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    packages = {"polyaccel", "polyaccel_cannsim", "polyaccel_conformance", "polyaccel_cuda", "polyaccel_npu"}
    assert {name.split("/")[0] for name in names} == {*packages, f"polyaccel-{project()['version']}.dist-info"}
    suffixes = {Path(name).suffix for name in names if name.split("/")[0] in packages}
    # The simulator is compiled where it is first used.
    assert suffixes <= {".py", ".typed", ".c", ".h"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_states_licence_python_and_ranges(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        message = email.message_from_bytes(archive.read(name))
    assert message["License-Expression"] == "Apache-2.0"
    assert message["Requires-Python"] == project()["requires-python"]
    assert message.get_all("Provides-Extra") == list(project()["optional-dependencies"])
    requirements = [Requirement(text) for text in message.get_all("Requires-Dist", [])]
    assert [str(one) for one in requirements if one.url or "==" in str(one.specifier)] == []


def test_the_sdist_can_build_itself(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "polyaccel/py.typed"} <= names
    assert not [name for name in names if name.startswith((".git/", ".tox/", "build/"))]


@pytest.mark.parametrize("extra", [*project()["optional-dependencies"], "cuda,npu"])
def test_an_extra_resolves_beside_the_installed_torch(extra: str, built: tuple[Path, Path], work: Path) -> None:
    options = ["--dry-run", "--quiet", "--report", "-", "--constraint", str(ROOT / "constraints.txt")]
    report = json.loads(run([*PIP, "install", *options, f"polyaccel[{extra}] @ {built[1].as_uri()}"], work))
    chosen = {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in report["install"]}
    assert "torch" not in chosen
    # It would install into Triton's own folder.
    assert "triton-ascend" not in chosen
    texts = [text for one in extra.split(",") for text in project()["optional-dependencies"][one]]
    wanted = {canonicalize_name(Requirement(text).name) for text in texts}
    assert wanted <= chosen.keys() | {
        canonicalize_name(one.metadata["Name"]) for one in importlib.metadata.distributions()
    }


def test_the_tests_ran_on_the_pinned_versions() -> None:
    wrong = []
    for name, pin in constraints().items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        if not pin.specifier.contains(installed, prereleases=True):
            wrong.append(f"{pin} pinned, {installed} installed in {sys.prefix}")
    assert wrong == []
