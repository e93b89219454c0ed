"""The oracle gives results from outside this code: published ones, and the formulas with 50 digits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polyaccel.backend import OPERATORS, STATIONS
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import finish
from tests.conformance.oracle.golden import Golden, array, results
from tests.conformance.oracle.make_goldens import FILE, goldens

FOLDER = FILE.parent
# In files whose goldens name no operator.
OPERATOR_OF = {"attention": "dense_attention", "rotary": "rotary_embedding", "sampling": "sample"}
SECTION_OF = {"route": "moe_route", "experts": "moe_experts"}
NOTHING_TO_COMPUTE = {"barrier"}


def read(name: str) -> list[Golden]:
    found = json.loads((FOLDER / f"{name}.json").read_text())
    assert isinstance(found, list)
    return found


def every() -> Iterator[tuple[str, Golden]]:
    """Each golden of each file with its operator."""
    for path in sorted(Path(FOLDER).glob("*.json")):
        content = json.loads(path.read_text())
        sections = content.items() if isinstance(content, dict) else [("", content)]
        for section, found in sections:
            for golden in found:
                known = OPERATOR_OF.get(path.stem) or SECTION_OF.get(section)
                yield str(golden.get("operator") or known), golden


COMPARED = [*read("high_precision"), *read("products"), *read("collectives")]


@pytest.mark.parametrize("golden", COMPARED, ids=lambda golden: f"{golden['operator']}: {golden['name']}")
@pytest.mark.parametrize("dtype", FORMATS)
def test_results_from_outside(golden: Golden, dtype: str) -> None:
    for name, found in results(golden, dtype).items():
        wanted = array(golden, name)
        np.testing.assert_allclose(found.value, wanted, rtol=1e-13, atol=1e-14)
        assert np.all(np.isfinite(found.bound))
        out = FORMATS[dtype]
        assert np.all(finish(found, out).tolerance >= np.abs(out.round(wanted) - wanted) * (1 - 1e-9))


def test_every_operator_and_station_has_three_with_a_named_source() -> None:
    counts = Counter(operator for operator, golden in every() if golden["source"])
    wanted = {*OPERATORS, *STATIONS} - NOTHING_TO_COMPUTE
    assert set(counts) == wanted
    assert {name: count for name, count in counts.items() if count < 3} == {}


def test_the_file_of_50_digits_is_what_its_script_writes() -> None:
    assert list(goldens()) == read("high_precision")
