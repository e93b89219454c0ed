"""The backends that must pass, each as its user gets it: installed from a wheel where it is no part of polyaccel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polyaccel_conformance.template.write import write_package
from tests.support.plugins import PluginHouse, environment, install_source

COMPOSITES = "composites"
"""The package that ``polyaccel new-backend`` writes, on the CPU: every operator as a composite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """A backend under test. ``plugin``: the folder below tests/ that holds its distribution, empty for none."""

    name: str
    plugin: str = ""
    devices: int = 2


BACKENDS = (
    Tested(name="cpu", devices=4),
    Tested(name=COMPOSITES),
    Tested(name="folded", plugin="folded"),
    Tested(name="simulated"),
    Tested(name="example", plugin="example_backend"),
)
FAILING = ("null",)
"""Backends that must fail."""


@dataclass(slots=True)
class Installed:
    """Installs what a backend needs when it is first asked for, below ``folder``."""

    folder: Path
    _variables: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def variables(self, tested: Tested) -> Mapping[str, str]:
        """Environment variables under which Python sees the backend."""
        if tested.name not in self._variables:
            self._variables[tested.name] = self._install(tested)
        return self._variables[tested.name]

    def _install(self, tested: Tested) -> Mapping[str, str]:
        own = self.folder / f"{tested.name}-{os.getpid()}"
        sites: list[Path] = []
        if tested.name == COMPOSITES:
            write_package(COMPOSITES, "cpu", own / "package")
            sites.append(install_source(own / "package", own / "work", own / "site"))
        elif tested.plugin:
            sites.append(PluginHouse(own).site(tested.plugin))
        return environment(*sites, cache=own / "cache")
