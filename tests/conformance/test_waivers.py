"""Waivers: what a file may say, which failures it covers, and when it makes a run fail."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from polyaccel_conformance.case import Case
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.waivers import Waiver, apply_waivers, read_waivers

TODAY = datetime.date(2026, 6, 1)
CASE = Case.of("linear", {"dtype": "float16", "dims.k": 300, "layouts.x": "offset"})
GOOD = """
[[waiver]]
test = "linear/values.bound/dtype=float16,dims.k=256..512"
reason = "the accumulator of the first revision"
url = "https://github.com/acme/issues/1"
expires = 2026-12-31
"""


def waiver(test: str, expires: datetime.date = datetime.date(2026, 12, 31)) -> Waiver:
    return Waiver(test=test, reason="known", url="https://github.com/acme/issues/1", expires=expires)


def written(folder: Path, text: str) -> Path:
    path = folder / "waivers.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    (found,) = read_waivers(written(tmp_path, GOOD))
    assert found.expires == datetime.date(2026, 12, 31)
    assert found.covers(CASE, "values.bound")


@pytest.mark.parametrize(
    ("test", "covers"),
    [
        ("linear/values.bound/*", True),
        ("lin*/values.*/*", True),
        ("sgmv/values.bound/*", False),
        ("linear/values.exact/*", False),
        ("linear/*/dtype=float16", True),
        ("linear/*/dtype=bfloat16", False),
        ("linear/*/dims.k=300", True),
        ("linear/*/dims.k=256..512", True),
        ("linear/*/dims.k=301..512", False),
        ("linear/*/dims.k=256..512,layouts.x=contiguous", False),
        ("linear/*/dims.heads=1", False),
    ],
)
def test_a_waiver_covers_the_failures_that_it_describes_and_no_others(test: str, covers: bool) -> None:
    assert waiver(test).covers(CASE, "values.bound") is covers


def test_a_waiver_that_covers_a_failure_makes_no_problem() -> None:
    applied = apply_waivers([waiver("linear/*/*")], [(CASE, "values.bound")], TODAY)
    assert (applied.covered, applied.problems, applied.uncovered) == ({0}, (), 0)


def test_a_failure_that_no_waiver_covers_is_left() -> None:
    applied = apply_waivers([waiver("linear/values.bound/*")], [(CASE, "values.bound"), (CASE, "memory.reads")], TODAY)
    assert (applied.covered, applied.uncovered) == ({0}, 1)


def test_a_waiver_that_has_expired_covers_nothing_and_is_a_problem() -> None:
    old = waiver("linear/*/*", datetime.date(2026, 5, 31))
    applied = apply_waivers([old], [(CASE, "values.bound")], TODAY)
    assert applied.covered == frozenset()
    assert applied.problems == ("waiver linear/*/* expired on 2026-05-31",)


def test_a_waiver_holds_through_its_last_day() -> None:
    assert not apply_waivers([waiver("linear/*/*", TODAY)], [(CASE, "values.bound")], TODAY).problems


def test_a_waiver_that_matches_no_failure_is_a_problem() -> None:
    applied = apply_waivers([waiver("sgmv/*/*")], [(CASE, "values.bound")], TODAY)
    assert applied.problems == ("waiver sgmv/*/* matches no failure; remove it",)
    assert apply_waivers([waiver("sgmv/*/*")], [], TODAY).problems


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("expires = 2026-12-31\n", ""), "lacks ['expires']"),
        (("expires = 2026-12-31", 'expires = "2026-12-31"'), "without quotes"),
        (("[[waiver]]\n", '[[waiver]]\nowner = "me"\n'), "unknown keys ['owner']"),
        (("linear/values.bound/dtype", "linear values.bound dtype"), "expected operator/check/axes"),
        (("dtype=float16,", "dtype,"), "expected axis=value"),
        (("256..512", "256..many"), "expected two integers"),
        (("https://", "see "), "expected an address"),
        (('"the accumulator of the first revision"', '" "'), "has no reason"),
        (("[[waiver]]", "[[waivers]]"), "expected tables [[waiver]]"),
        (("[[waiver]]", "[[waiver]"), "waivers"),
    ],
)
def test_a_malformed_file_is_refused_with_what_is_wrong(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(UsageError) as error:
        read_waivers(written(tmp_path, GOOD.replace(*change)))
    assert says in str(error.value)


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_waivers(tmp_path / "none.toml")
