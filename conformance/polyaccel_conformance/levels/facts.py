"""What a case is an example of, where no single axis says it: named by the required tables as ``facts.<name>``."""

from __future__ import annotations

from collections.abc import Mapping

from polyaccel_conformance.case import Case, Choice


def facts(case: Case) -> Mapping[str, Choice]:
    """Of this case: ``rank`` (every rank of an adapter in it), ``mixed_ranks``, ``rows_without_adapter``,
    ``slice_narrower_than_rank``, ``quantised``."""
    return {"facts.quantised": bool(case.structure.get("quantised", False))}
