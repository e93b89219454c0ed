"""The wheel alone, in an environment with torch_npu and without CANN: its commands reach simulated cards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.packaging.overlay import PIP, Overlay, copy_sources, create, link_dependencies, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed; run tox -e npu-sim"
)


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Overlay:
    work = tmp_path_factory.mktemp("wheel")
    source = copy_sources(work / "source")
    run([*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(work / "built"), str(source)], work)
    (wheel,) = (work / "built").glob("*.whl")
    return create("wheel", wheel, link_dependencies(work / "dependencies"), work / "wheel")


@pytest.fixture(autouse=True)
def _own_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever makes this test's own process see simulated cards is not handed on."""
    for name in ("CANNSIM_ACTIVE", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


def _simulated(overlay: Overlay, *command: str) -> str:
    program = [str(overlay.folder / "bin" / command[0]), *command[1:]]
    return overlay.run("polyaccel-cannsim", "run", "--devices", "3", "--", *program)


def test_the_real_torch_npu_computes_on_a_simulated_card(overlay: Overlay) -> None:
    program = (
        "import polyaccel_cannsim, torch, torch_npu\n"
        "print(polyaccel_cannsim.__file__, (torch.ones(2, device='npu') + 1).tolist())"
    )
    # torch_npu's warnings come first.
    path, _, numbers = _simulated(overlay, "python", "-c", program).splitlines()[-1].partition(" ")
    assert Path(path).is_relative_to(overlay.site)
    assert numbers == "[2.0, 2.0]"


def test_the_backend_is_listed_with_the_simulated_cards(overlay: Overlay) -> None:
    (row,) = [line for line in _simulated(overlay, "polyaccel", "backends").splitlines() if " npu " in line]
    assert row.startswith("PASS")
    assert row.count("Ascend910B3") == 3


def test_without_simulated_cards_it_is_listed_with_what_is_missing(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    (row,) = [line for line in overlay.run("polyaccel", "backends").splitlines() if " npu " in line]
    if row.startswith("PASS"):
        pytest.skip("CANN is installed on this machine")
    assert "CANN is missing" in row
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in row
