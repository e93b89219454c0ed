"""What the reference says, from a folder that several processes share."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_conformance.models.answers import Answer
from polyaccel_conformance.models.engines import Workshop
from polyaccel_conformance.models.kept import Kept
from polyaccel_conformance.models.rounding import Rounding
from polyaccel_conformance.models.variations import BASE, MANY

FLOATS = st.lists(st.floats(allow_nan=False), max_size=4).map(tuple)


def _fail() -> None:
    raise AssertionError("it was worked out again")


@given(tokens=st.lists(st.integers(0, 1 << 20), max_size=4).map(tuple), floats=FLOATS)
def test_every_bit_of_an_answer_comes_back(tokens: tuple[int, ...], floats: tuple[float, ...]) -> None:
    given_answers = [Answer(tokens=tokens, logprobs=floats, margins=floats[::-1])]
    with tempfile.TemporaryDirectory() as folder:
        Kept(Path(folder)).answers("x", lambda: given_answers)
        found = Kept(Path(folder)).answers("x", _fail)  # type: ignore[arg-type, return-value]
    assert found == given_answers


def test_a_rounding_comes_back(tmp_path: Path) -> None:
    exact = (np.array([0.1, -np.pi]), np.array([]))
    computed = Rounding(exact=exact, tolerance=tuple(values**2 for values in exact))
    Kept(tmp_path).rounding("x", lambda: computed)
    found = Kept(tmp_path).rounding("x", _fail)  # type: ignore[arg-type, return-value]
    for before, after in ((computed.exact, found.exact), (computed.tolerance, found.tolerance)):
        assert [v.tolist() for v in before] == [v.tolist() for v in after]


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Kept(None)
    kept.answers("x", list)
    with pytest.raises(AssertionError, match="again"):
        kept.answers("x", _fail)  # type: ignore[arg-type, return-value]


def test_a_second_process_asks_no_engine_for_the_same_and_one_for_another(tmp_path: Path) -> None:
    with Workshop(tmp_path) as first, Workshop(tmp_path) as second:
        answers, known = first.reference("llama", BASE), first.rounding("llama", BASE)
        with mock.patch.object(Workshop, "open", side_effect=AssertionError("an engine was opened")):
            assert second.reference("llama", BASE) == answers
            again = second.rounding("llama", BASE)
            with pytest.raises(AssertionError, match="opened"):
                second.reference("llama", MANY)
            with pytest.raises(AssertionError, match="opened"):
                second.reference("qwen3", BASE)
    assert [v.tolist() for v in again.tolerance] == [v.tolist() for v in known.tolerance]
