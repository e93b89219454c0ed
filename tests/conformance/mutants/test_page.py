"""The committed page and records on mutants are whole, and the page says what is not as it must be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutants.catalogue import HEALTHY, MUTANTS
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.mutants.page import page, problems, sole_killers
from polyaccel_conformance.mutants.records import Records, mark_of
from polyaccel_conformance.mutants.score import Score

DOCS = Path(__file__).parents[3] / "docs"


def _mutant(name: str, check: str = "a.check", **fields: object) -> Mutant:
    return Mutant(name=name, what="A bug.", operators=("gelu",), check=check, apply=lambda b: b, **fields)  # type: ignore[arg-type]


def _score(name: str, **kills: int) -> Score:
    kills = {check.replace("__", "."): count for check, count in kills.items()}
    return Score(mutant=name, cases=10, failing=max(kills.values(), default=0), kills=kills, asked=("a.check",))


def test_the_committed_page_is_what_its_records_give() -> None:
    records = Records(DOCS / "mutants.json")
    assert page(MUTANTS, records, tuple(CHECKS), HEALTHY) == (DOCS / "mutants.md").read_text(encoding="utf-8")


def test_every_mutant_is_found_and_every_check_is_the_only_killer_of_one() -> None:
    assert problems(MUTANTS, Records(DOCS / "mutants.json"), tuple(CHECKS), HEALTHY) == []


def test_every_mutant_was_found_on_three_fresh_seeds_without_the_fixed_list() -> None:
    records = Records(DOCS / "mutants.json")
    for mutant in MUTANTS.values():
        seeds = records.of(mutant).seeds
        assert len(seeds) >= 3, mutant.name
        assert all(mutant.check in score.kills for score in seeds.values()), mutant.name


def test_what_is_not_as_it_must_be_is_said() -> None:
    mutants = {m.name: m for m in (_mutant("x.dead"), _mutant("x.alive"), _mutant("x.wide", narrow=True))}
    records = Records(None)
    records.update(mutants["x.dead"], full=_score("x.dead", a__check=2, b__check=1))
    records.update(mutants["x.alive"], full=_score("x.alive", b__check=1))
    records.update(mutants["x.wide"], full=_score("x.wide", a__check=1), uniform=_score("x.wide", a__check=1))
    records.host("healthy", _score("healthy", a__check=1))
    assert problems(mutants, records, ("a.check", "b.check", "c.check"), ("healthy", "other")) == [
        "x.alive survives a.check",
        "x.wide is called narrow, but 10.0% of uniformly drawn cases fail",
        "healthy code (healthy) is killed by a.check",
        "healthy code (other) was not run",
        "1 mutants are narrow, at least 15 must be",
        "c.check is the only killer of no mutant",
    ]
    text = page(mutants, records, ("a.check", "b.check", "c.check"))
    assert "| `c.check` | **none** |" in text
    assert "- x.alive survives a.check" in text


def test_a_check_kills_alone_what_survives_when_it_is_switched_off() -> None:
    records = Records(None)
    one, two = _mutant("x.one"), _mutant("x.two")
    records.update(one, full=_score("x.one", a__check=3))
    records.update(two, full=_score("x.two", a__check=3, b__check=1))
    assert sole_killers(records.mutants) == {"a.check": ["x.one"]}


def test_records_survive_their_file_and_another_definition_makes_one_stale(tmp_path: Path) -> None:
    path = tmp_path / "mutants.json"
    mutant = _mutant("x.one")
    Records(path).update(mutant, full=_score("x.one", a__check=3), seeds={"5": _score("x.one")})
    assert Records(path).of(mutant).full == _score("x.one", a__check=3)
    changed = dataclasses.replace(mutant, operators=("linear",))
    assert mark_of(changed) != mark_of(mutant)
    assert Records(path).of(changed).full is None


def test_the_record_of_a_mutant_that_is_no_more_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "mutants.json"
    one, gone = _mutant("x.one"), _mutant("x.gone")
    for mutant in (one, gone):
        Records(path).update(mutant, full=_score(mutant.name))
    records = Records(path)
    records.keep({"x.one": one})
    records.update(one, full=_score("x.one", a__check=3))
    assert list(Records(path).mutants) == ["x.one"]


def test_a_file_that_holds_no_records_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mutants.json"
    path.write_text("[]")
    with pytest.raises(UsageError, match="holds no records"):
        Records(path)
