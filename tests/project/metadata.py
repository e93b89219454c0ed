"""Reads the project's own metadata files."""

from __future__ import annotations

import tomllib
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.project.source import ROOT


def pyproject() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def project() -> dict[str, Any]:
    table: dict[str, Any] = pyproject()["project"]
    return table


def constraints() -> dict[str, Requirement]:
    """Canonical name -> the pin in constraints.txt, in the file's order."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}
