"""API ranges: their form, what they accept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.version import API_VERSION, ApiRange, format_version

VERSIONS = st.tuples(st.integers(0, 30), st.integers(0, 30))


@given(VERSIONS, VERSIONS)
def test_a_range_reads_back_as_it_was_written(first: tuple[int, int], second: tuple[int, int]) -> None:
    low, high = sorted((first, second))
    made = ApiRange(low, high)
    assert ApiRange.parse(str(made)) == made
    assert ApiRange.parse(f"  {made}\n") == made


@pytest.mark.parametrize(
    "text", ["", "1.0:1.3", "v1_0", "v1_0:", "v1.0:v1.3", "v1_0:v1_3:v1_4", "v1_0;v1_3", "v-1_0:v1_0"]
)
def test_another_form_is_refused_with_the_form_that_is_wanted(text: str) -> None:
    with pytest.raises(ValueError, match=r"'v1_0:v1_3'") as caught:
        ApiRange.parse(text)
    assert repr(text) in str(caught.value)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="low end is above"):
        ApiRange.parse("v1_3:v1_0")


@given(VERSIONS, VERSIONS, VERSIONS)
def test_a_range_accepts_what_lies_inside_and_newer_minors_of_its_last_major(
    first: tuple[int, int], second: tuple[int, int], version: tuple[int, int]
) -> None:
    low, high = sorted((first, second))
    inside = low <= version <= high
    newer_minor = version > high and version[0] == high[0]
    assert ApiRange(low, high).accepts(version) == (inside or newer_minor)


def test_a_range_from_this_version_on_accepts_this_version() -> None:
    assert ApiRange(API_VERSION, API_VERSION).accepts(API_VERSION)
    assert format_version((1, 12)) == "1.12"
