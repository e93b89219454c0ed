"""What a case is an example of, where no single axis says it: named by the required tables as ``facts.<name>``."""

from __future__ import annotations

from collections.abc import Mapping

from polyaccel.backend.levels import Value
from polyaccel_conformance.case import Case, Choice


def facts(case: Case) -> Mapping[str, Choice]:
    """Of this case: ``rank`` (every rank of an adapter in it), ``mixed_ranks``, ``rows_without_adapter``,
    ``slice_narrower_than_rank``, ``quantised``."""
    return {"facts.quantised": bool(case.structure.get("quantised", False))}


def axes_of_fact(operator: str, name: str, value: Value) -> dict[str, Choice]:
    """Axes that make a case of ``operator`` an example of a fact; empty where ``name`` is an axis itself or unknown."""
    return {}
