"""The oracle of products on structured data, and stores that are wrong in the exact tier."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Expected
from tests.conformance.drawn import worst
from tests.conformance.emulated import Form
from tests.conformance.oracle.subjects import PRODUCTS, SUBJECTS, WIDE


@pytest.mark.parametrize("operator", ["linear", "sgmv", "column_linear"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_truncating_store_is_wrong_in_the_exact_tier(operator: str, dtype: str) -> None:
    """Random integers have ties and values between: the cancelling ones are all representable and do not show it."""
    emulate, out = PRODUCTS[operator], FORMATS[dtype]
    wrong = 0.0
    for problem in SUBJECTS[operator].drawn(3, 3, **WIDE, dtype=(dtype,), data=("integers",)):
        stored = {name: out.truncate(y) for name, y in emulate(problem, Form(how="pairwise")).items()}
        wrong = max(wrong, worst(problem, stored))
    assert wrong == np.inf


def test_structured_data_are_over_the_bound_of_exchangeable_ones_only() -> None:
    """Falling magnitudes make early partial sums large: what is random in ``normal`` is the worst order in ``ramp``."""
    (normal,) = SUBJECTS["linear"].drawn(1, 1, **WIDE, dtype=("float32",), data=("normal",))
    (ramp,) = SUBJECTS["linear"].drawn(1, 1, **WIDE, dtype=("float32",), data=("ramp",))
    tight, loose = (next(iter(p.expected().values())) for p in (normal, ramp))
    assert isinstance(tight, Expected)
    assert isinstance(loose, Expected)
    relative = partial(np.median, axis=None)
    assert relative(loose.tolerance / np.abs(loose.value)) > 2 * relative(tight.tolerance / np.abs(tight.value))
