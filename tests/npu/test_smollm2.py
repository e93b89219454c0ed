"""The real SmolLM2 and its two adapters on 1 to 4 cards: the CPU backend's tokens wherever those lead clearly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.npu.answers import Answers, ask, assert_same

pytestmark = [pytest.mark.model, pytest.mark.slow]
NAMES = (None, "pirate", "json")


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> Mapping[str | None, Answers]:
    return ask(smollm2_path, "cpu", "float32", adapters=NAMES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_card_answers_with_the_cpu_backends_tokens(
    smollm2_path: Path, expected: Mapping[str | None, Answers], dtype: str
) -> None:
    found = ask(smollm2_path, "npu", dtype, adapters=NAMES, executor="inline")
    assert "Paris" in found[None].texts[0]
    for name in NAMES:
        assert_same(found[name], expected[name], f"{dtype}, adapter {name}")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_several_cards_answer_with_the_cpu_backends_tokens(
    smollm2_path: Path, expected: Mapping[str | None, Answers], ranks: int
) -> None:
    found = ask(smollm2_path, "npu", "float16", ranks=ranks, adapters=NAMES)
    assert "Paris" in found[None].texts[0]
    for name in NAMES:
        assert_same(found[name], expected[name], f"{ranks} cards, adapter {name}")


def test_adapters_change_the_answer(expected: Mapping[str | None, Answers]) -> None:
    assert len({answers.ids for answers in expected.values()}) == len(NAMES)
