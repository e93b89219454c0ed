"""Random123's known answers, and what a request's random numbers depend on."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from polyaccel.engine.philox import philox4x32, uniforms

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


# The three vectors that Random123 1.14 lists for philox4x32 with 10 rounds (tests/kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    words = [np.full((2, 3), word, dtype=np.uint64) for word in (*counter, *key)]
    result = philox4x32((words[0], words[1], words[2], words[3]), (words[4], words[5]))
    for words_out, expected in zip(result, answer, strict=True):
        assert (words_out == expected).all()


def test_a_uniform_is_the_top_of_the_first_word_at_counter_position_and_choice() -> None:
    zero = np.zeros((), dtype=np.uint64)
    seed, choice, position = 0x299F31D0A4093822, 7, (3 << 32) + 5
    first = philox4x32(
        (zero + np.uint64(5), zero + np.uint64(3), zero + np.uint64(choice), zero),
        (zero + np.uint64(0xA4093822), zero + np.uint64(0x299F31D0)),
    )[0]
    got = uniforms(np.array(seed, dtype=np.uint64), np.array(choice), np.array(position))
    assert got == np.float32(int(first) >> 8) / np.float32(2**24)


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5, unique=True),
    start=st.integers(0, 2**40),
    choice=st.integers(0, 127),
)
def test_a_number_does_not_depend_on_what_is_drawn_beside_it(seeds: list[int], start: int, choice: int) -> None:
    places = start + np.arange(64)
    together = uniforms(np.array(seeds, dtype=np.uint64)[:, None], np.array([[choice]]), places)
    assert together.dtype == np.float32
    assert together.shape == (len(seeds), 64)
    assert (together >= 0).all()
    assert (together < 1).all()
    assert (together * 2**24 % 1 == 0).all()
    for row, seed in enumerate(seeds):
        for column in (0, 17, 63):
            alone = uniforms(np.uint64(seed), np.int64(choice), np.int64(start + column))
            assert alone == together[row, column]


def test_seeds_choices_and_positions_all_matter() -> None:
    base = uniforms(np.uint64(1), np.int64(0), np.arange(1000))
    assert not np.array_equal(base, uniforms(np.uint64(2), np.int64(0), np.arange(1000)))
    assert not np.array_equal(base, uniforms(np.uint64(1 + (1 << 32)), np.int64(0), np.arange(1000)))
    assert not np.array_equal(base, uniforms(np.uint64(1), np.int64(1), np.arange(1000)))
    assert len(set(base.tolist())) > 990
    assert abs(base.mean() - 0.5) < 0.05
