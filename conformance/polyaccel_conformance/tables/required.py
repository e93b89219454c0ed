"""Importing another project's package for a table, only when the table is asked for."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

from polyaccel_conformance.errors import UsageError


def required(module: str, distribution: str) -> ModuleType:
    """The module.

    Raises:
        UsageError: it is not installed, with the distribution to install; or it is, and does not import here.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            raise UsageError(f"the table needs the distribution {distribution!r}: pip install {distribution}") from None
        raise UsageError(f"distribution {distribution!r} is installed, but {error.name!r} is not") from error
    except Exception as error:
        raise UsageError(
            f"distribution {distribution!r} does not import here: {type(error).__name__}: {error}"
        ) from error


def release(distribution: str) -> str:
    """``name version`` of an installed distribution, for the report."""
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"{distribution} (no metadata)"
