"""The verdict of a campaign: what is explained, what is stale, what is enough; and the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutation.campaign import Outcome, State
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.listing import edits_of
from polyaccel_conformance.mutation.survivors import entry, judge, read_survivors
from polyaccel_conformance.mutation.table import MARK, markdown, write
from polyaccel_conformance.mutation.unit import PREFIX

SOURCE = (
    "def f(x):\n" + "".join(f"    x += {number}\n" for number in range(2, 42)) + "    return x[1:\n             x]\n"
)
KILLED, ALIVE = Outcome(killed="values.bound"), Outcome(killed="")


@pytest.fixture
def edits() -> list[Edit]:
    return list(edits_of("f.py", SOURCE.encode()))


def explained(tmp_path: Path, *edits: Edit) -> Path:
    path = tmp_path / "survivors.toml"
    text = "\n".join(entry(edit) for edit in edits)
    path.write_text(text.replace('why = ""', 'why = "equivalent"').replace("why = ''", "why = 'equivalent'"))
    path.write_text(path.read_text().replace("reason = ''", "reason = 'the same'"))
    return path


def test_an_explained_survivor_passes_and_another_one_does_not(tmp_path: Path, edits: list[Edit]) -> None:
    outcomes = {edit.key: KILLED for edit in edits} | {edits[3].key: ALIVE}
    file = explained(tmp_path, edits[3])
    assert judge(edits, outcomes, read_survivors(file)).passed
    verdict = judge(edits, outcomes | {edits[5].key: ALIVE}, read_survivors(file))
    assert not verdict.passed
    assert verdict.unexplained == (edits[5],)


def test_an_explanation_of_a_killed_mutant_is_stale(tmp_path: Path, edits: list[Edit]) -> None:
    verdict = judge(edits, {edit.key: KILLED for edit in edits}, read_survivors(explained(tmp_path, edits[3])))
    assert not verdict.passed
    assert [e.text for e in verdict.stale] == [edits[3].text]


def test_too_many_survivors_fail_even_if_all_are_explained(tmp_path: Path, edits: list[Edit]) -> None:
    alive = edits[: len(edits) // 10]
    outcomes = {edit.key: KILLED for edit in edits} | {edit.key: ALIVE for edit in alive}
    verdict = judge(edits, outcomes, read_survivors(explained(tmp_path, *alive)))
    assert not verdict.unexplained
    assert verdict.rate < 0.95
    assert not verdict.passed


def test_every_edit_can_be_written_to_toml_and_read_back(tmp_path: Path, edits: list[Edit]) -> None:
    hard = edits_of("g.py", b"def g(x):\n    return ~x['a \\\\'] | (x[\"it's\"] &\n        x)\n")
    found = read_survivors(explained(tmp_path, *edits, *hard))
    assert [e.key for e in found] == [e.key for e in (*edits, *hard)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("why = 'equivalent'", "why = 'perhaps'"), "why must be one of"),
        (("reason = 'the same'", "reason = ' '"), "with a reason"),
        (("function =", "functions ="), "functions"),
    ],
)
def test_an_incomplete_explanation_is_a_usage_error(
    tmp_path: Path, edits: list[Edit], change: tuple[str, str], message: str
) -> None:
    path = explained(tmp_path, edits[0])
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UsageError, match=message):
        read_survivors(path)


def test_a_mutant_is_explained_once(tmp_path: Path, edits: list[Edit]) -> None:
    with pytest.raises(UsageError, match="explained twice"):
        read_survivors(explained(tmp_path, edits[0], edits[0]))


def test_outcomes_outlive_the_process_but_not_an_edit_of_their_file(tmp_path: Path, edits: list[Edit]) -> None:
    path = tmp_path / "outcomes.json"
    state = State(path, {"f.py": "1"})
    state.add(edits[0], KILLED)
    state.add(edits[1], ALIVE)
    again = State(path, {"f.py": "1"})
    assert again.outcomes == {edits[0].key: KILLED, edits[1].key: ALIVE}
    again.forget_survivors()
    assert again.outcomes == {edits[0].key: KILLED}
    assert State(path, {"f.py": "2"}).outcomes == {}


def test_the_result_names_files_rules_killers_and_survivors(tmp_path: Path, edits: list[Edit]) -> None:
    unit = Outcome(killed=f"{PREFIX}test_f.py::test_it")
    outcomes = {edit.key: KILLED for edit in edits} | {edits[3].key: ALIVE, edits[4].key: unit}
    text = markdown(edits, outcomes, read_survivors(explained(tmp_path, edits[3])))
    count = len(edits)
    assert f"| f.py | {count} | {count - 2} | 1 | 1 |" in text
    assert f"| `values.bound` | {count - 2} |" in text
    assert "| `unit tests` | 1 |" in text
    assert f"| {edits[3].where} | `{edits[3].before}` | `{edits[3].after}` | equivalent: the same |" in text


def test_the_result_replaces_what_follows_the_mark(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write(path, "one\n")
    assert path.read_text() == "one\n"
    path.write_text(f"head\n\n{MARK}\n\nold\n")
    write(path, "new\n")
    assert path.read_text() == f"head\n\n{MARK}\n\nnew\n"
