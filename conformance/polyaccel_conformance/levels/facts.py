"""What a case is an example of, where no single axis says it: named by the required tables as ``facts.<name>``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyaccel.backend.levels import Value
from polyaccel_conformance.case import Case, Choice

Axes = Mapping[str, Sequence[Choice]]

FLOAT = "float"


def facts(case: Case) -> Mapping[str, Choice]:
    """Of this case: ``rank`` (every rank of an adapter in it), ``mixed_ranks``, ``rows_without_adapter``,
    ``slice_narrower_than_rank``, ``quantised``."""
    structure = case.structure
    found: dict[str, Choice] = {"facts.quantised": _is_quantised(structure)}
    if "rank" in case.dims and "ranks" in structure:
        found |= _adapters(case)
    return found


def _is_quantised(structure: Mapping[str, Choice]) -> bool:
    return bool(structure.get("quantised", False)) or structure.get("weight", FLOAT) != FLOAT


def _adapters(case: Case) -> dict[str, Choice]:
    from polyaccel_conformance.problems.adapters import module_ranks
    from polyaccel_conformance.problems.sgmv import thin_rows

    widths = thin_rows(case.dim("n"), str(case.structure.get("slices", "one"))) if "n" in case.dims else ()
    ranks = module_ranks(str(case.structure["ranks"]), case.dim("rank"), max(len(widths), 1))
    seen = {rank for adapter in ranks for rank in adapter if rank}
    narrow = any(rank > width for adapter in ranks for rank, width in zip(adapter, widths, strict=False) if width)
    return {
        "facts.rank": tuple(sorted(seen)),
        "facts.mixed_ranks": len({max(adapter) for adapter in ranks}) > 1,
        "facts.slice_narrower_than_rank": narrow,
        "facts.rows_without_adapter": case.structure.get("segments") == GAPS and case.dims.get("tokens", 0) != 0,
    }


GAPS = "gaps"
"""Segments with rows between them that no adapter applies to."""


def axes_of_fact(axes: Axes, name: str, value: Value) -> dict[str, Choice] | None:
    """Axes that make a case with these axes an example of a fact; None where none does."""
    if name == "facts.quantised":
        forms = axes.get("structure.weight", ())
        if forms:
            return {"structure.weight": next((form for form in forms if (form != FLOAT) is value), forms[0])}
        return {"structure.quantised": value} if "structure.quantised" in axes else None
    if "dims.rank" not in axes or "structure.ranks" not in axes:
        return None
    if name == "facts.rank":
        # A few cases hold every rank.
        assert isinstance(value, int)
        return {"dims.rank": value, "structure.ranks": "consecutive"}
    if name == "facts.mixed_ranks":
        return {"dims.rank": 8, "structure.ranks": "mixed"}
    if name == "facts.slice_narrower_than_rank":
        return {"dims.rank": 32, "structure.ranks": "pair", "structure.slices": "thin", "dims.n": 17}
    if name == "facts.rows_without_adapter":
        return {"structure.segments": GAPS} if GAPS in axes.get("structure.segments", ()) else None
    return None
