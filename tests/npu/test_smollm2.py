"""The real SmolLM2 and its two adapters on 1 to 4 cards: the CPU backend's tokens wherever those lead clearly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from tests.npu.answers import Answers, ask, assert_same

pytestmark = [pytest.mark.model, pytest.mark.slow]
NAMES = (None, "pirate", "json")
Said = Mapping[str | None, Answers]


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> Said:
    found = ask(smollm2_path, "cpu", "float32", adapters=NAMES)
    assert "Paris" in found[None].texts[0]
    return found


@pytest.fixture(scope="module")
def said(smollm2_path: Path) -> Callable[[str, int], Said]:
    """By dtype and ranks, call by call; asked once."""

    @functools.cache
    def said(dtype: str, ranks: int) -> Said:
        executor = "inline" if ranks == 1 else "auto"
        return ask(smollm2_path, "npu", dtype, ranks=ranks, adapters=NAMES, executor=executor)

    return said


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_card_answers_with_the_cpu_backends_tokens(
    said: Callable[[str, int], Said], expected: Said, dtype: str
) -> None:
    found = said(dtype, 1)
    for name in NAMES:
        assert_same(found[name], expected[name], f"{dtype}, adapter {name}")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_several_cards_answer_with_the_cpu_backends_tokens(
    said: Callable[[str, int], Said], expected: Said, ranks: int
) -> None:
    found = said("float16", ranks)
    for name in NAMES:
        assert_same(found[name], expected[name], f"{ranks} cards, adapter {name}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_replayed_steps_answer_as_those_that_run_call_by_call(
    smollm2_path: Path, said: Callable[[str, int], Said], ranks: int
) -> None:
    names = (None, "pirate", "json", "pirate")
    eager = said("float16", ranks)
    captures: list[tuple[int, int]] = []
    found = ask(smollm2_path, "npu", "float16", ranks=ranks, adapters=names, graphs=True, captures=captures)
    for name in NAMES:
        assert found[name].ids == eager[name].ids, f"{ranks} cards, adapter {name}"
    made = [captured for captured, _ in captures]
    assert made[:2] == [1, 2], "one graph without adapters, one with"
    assert made[2] <= 3, "the second adapter's rank rows end later, which may be another size of graph"
    assert made[3] == made[2], "an adapter that comes back captures nothing"
    replays = [0, *(replayed for _, replayed in captures)]
    assert all(later > before for before, later in pairwise(replays)), replays


def test_adapters_change_the_answer(expected: Said) -> None:
    assert len({answers.ids for answers in expected.values()}) == len(NAMES)
