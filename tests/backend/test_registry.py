"""The registry on distributions that exist as metadata only: refusals, choices by priority, broken plugins."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest

from polyaccel.backend import BackendUnavailable, choose, list_backends, load
from polyaccel.backend.registry import InstalledBackend, installed
from polyaccel.backend.version import API_VERSION

Install = Callable[..., None]
PLUGIN = """
from polyaccel.backend import Availability, TableBackend

class Plugin(TableBackend):
    priority = {priority}

    def __init__(self):
        super().__init__("cpu", {{}})

    def probe(self):
{probe}
"""
USABLE = "return Availability(usable=True, devices=('x',))"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Writes a distribution with one backend as if it were installed."""
    monkeypatch.syspath_prepend(tmp_path)
    # What stevedore remembers of these folders is not to stay behind in the user's cache.
    monkeypatch.setattr("stevedore._cache._c._dir", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write(
        name: str,
        module: str | None = None,
        *,
        target: str = "{module}:Plugin",
        api: str | None = "v1_0:v1_0",
        priority: int | None = None,
        probe: str = USABLE,
        distribution: str | None = None,
    ) -> None:
        module_name = f"plugin_{(distribution or name).replace('-', '_')}"
        text = module if module is not None else PLUGIN.format(priority=priority, probe=indent(probe, " " * 8))
        (tmp_path / f"{module_name}.py").write_text(dedent(text), encoding="utf-8")
        info = tmp_path / f"{(distribution or name).replace('-', '_')}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution or name}\nVersion: 2.5\n")
        groups = f"[polyaccel.backends]\n{name} = {target.format(module=module_name)}\n"
        groups += "" if api is None else f"[polyaccel.backend_api]\n{name} = {api}\n"
        (info / "entry_points.txt").write_text(groups)
        importlib.invalidate_caches()

    return write


def _installed(api: str | None) -> InstalledBackend:
    return InstalledBackend(name="x", target="m:X", distribution="dist-x", version="2.5", api=api)


@pytest.mark.parametrize(
    ("api", "refusal"),
    [
        (None, "states no API range"),
        ("1.0", "is not of the form"),
        ("v2_0:v1_0", "is empty"),
        ("v9_0:v9_9", "works with API v9_0:v9_9, this is API 1."),
        ("v0_1:v0_9", "works with API v0_1:v0_9"),
    ],
)
def test_a_range_that_does_not_fit_is_refused_with_its_distribution(api: str | None, refusal: str) -> None:
    text = _installed(api).api_refusal()
    assert text is not None
    assert text.startswith("dist-x 2.5 (m:X)")
    assert refusal in text
    if "works with" not in refusal:
        now = f"v{API_VERSION[0]}_{API_VERSION[1]}"
        assert f'[project.entry-points."polyaccel.backend_api"] x = "{now}:{now}"' in text


def test_a_range_that_fits_is_accepted() -> None:
    for api in ("v1_0:v1_0", "v1_0:v1_7", "v0_5:v1_0", "v1_0:v2_0"):
        assert _installed(api).api_refusal() is None


def test_a_backend_has_the_name_it_is_installed_under(install: Install) -> None:
    install("fast")
    backend = load("fast")
    assert (type(backend).__name__, backend.name) == ("Plugin", "fast")
    (found,) = [entry for entry in installed() if entry.name == "fast"]
    assert found.origin == "fast 2.5 (plugin_fast:Plugin)"
    assert found.api == "v1_0:v1_0"


@pytest.mark.parametrize(
    ("module", "target", "cause"),
    [
        ("Plugin = 3", "{module}:Plugin", "TypeError: entry point 'odd' is 3"),
        ("class Plugin: ...", "{module}:Plugin", "is a Plugin, not a Backend"),
        ("class Plugin:\n    def __init__(self): raise OSError('no card')", "{module}:Plugin", "OSError: no card"),
        ("", "{module}:Plugin", "AttributeError"),
        ("", "no_such_module:Plugin", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def Plugin(:", "{module}:Plugin", "SyntaxError"),
    ],
)
def test_a_target_that_is_no_backend_is_an_error_that_names_it_and_a_row_that_fails(
    install: Install, module: str, target: str, cause: str
) -> None:
    install("odd", module, target=target)
    with pytest.raises(BackendUnavailable) as caught:
        load("odd")
    assert "odd 2.5" in str(caught.value)
    assert cause in str(caught.value)
    (row,) = [row for row in list_backends() if row.name == "odd"]
    assert (row.usable, row.reason) == (False, str(caught.value))


def test_a_probe_that_raises_is_an_error_that_names_it_and_a_row_that_fails(install: Install) -> None:
    install("odd", probe="raise OSError('no card')", priority=109)
    for name in ("odd", "auto"):
        with pytest.raises(BackendUnavailable, match="'odd' is broken: its probe raised OSError: no card"):
            choose(name)
    (row,) = [row for row in list_backends() if row.name == "odd"]
    assert not row.usable
    assert "no card" in row.reason


def test_auto_takes_the_usable_backend_of_highest_priority(install: Install) -> None:
    install("low", priority=101)
    install("high", priority=107)
    install("absent", priority=109, probe="return Availability(usable=False, reason='no card')")
    install("tool", priority=None)
    assert choose().name == "high"


def test_backends_of_equal_priority_are_taken_in_order_of_their_names(install: Install) -> None:
    install("b", priority=50)
    install("a", priority=50)
    assert choose().name == "a"


def test_auto_does_not_pass_over_hardware_that_is_there(install: Install) -> None:
    install("low", priority=101)
    install("card", priority=109, probe="return Availability(usable=False, reason='driver 5 below 7', hardware=True)")
    with pytest.raises(BackendUnavailable, match="'card' is present but cannot be used: driver 5 below 7") as caught:
        choose()
    assert 'backend="cpu"' in str(caught.value)


def test_a_backend_that_was_asked_for_and_cannot_be_used_says_why(install: Install) -> None:
    install("card", probe="return Availability(usable=False, reason='no card')")
    with pytest.raises(BackendUnavailable, match="'card' cannot be used here: no card"):
        choose("card")


def test_a_name_claimed_twice_is_refused_and_listed_twice(install: Install) -> None:
    install("twin", distribution="dist-a")
    install("twin", distribution="dist-b")
    for ask in (lambda: load("twin"), installed, choose):
        with pytest.raises(BackendUnavailable, match=r"2 distributions register backend 'twin'") as caught:
            ask()
        assert "dist-a 2.5" in str(caught.value)
        assert "dist-b 2.5" in str(caught.value)
    assert load("null").name == "null"
    rows = [row for row in list_backends() if row.name == "twin"]
    assert [row.origin.split()[0] for row in rows] == ["dist-a", "dist-b"]
    assert not any(row.usable for row in rows)


def test_a_range_counts_for_its_own_distribution_only(install: Install) -> None:
    install("mine", api=None, distribution="dist-a")
    install("other", distribution="dist-b")
    with pytest.raises(BackendUnavailable, match=r"dist-a 2.5 .* states no API range"):
        load("mine")
    assert load("other").name == "other"
