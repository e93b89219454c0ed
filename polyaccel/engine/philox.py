"""Counter-based random numbers: a value depends on its seed and counter, never on what was drawn before or beside it.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); its known
answers are those of Random123.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]
Counter: TypeAlias = tuple[Words, Words, Words, Words]

ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counter: Counter, key: tuple[Words, Words]) -> Counter:
    """Four 32-bit words for each counter. All arrays are uint64 that hold 32-bit values and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _WORD) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _WORD) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def uniforms(
    seed: npt.NDArray[np.uint64], choice: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.float32]:
    """Random numbers in [0, 1), multiples of 2**-24, float32; the arguments broadcast together.

    ``seed`` (uint64) is the key; the counter is (position's low word, its high word, choice, 0); the number is the top
    24 bits of the first output word. ``positions`` are those of the tokens being sampled.
    """
    place = np.asarray(positions).astype(np.uint64)
    zero = np.zeros((), dtype=np.uint64)
    counter = (place & _LOW, place >> _WORD, np.asarray(choice).astype(np.uint64) & _LOW, zero)
    key = np.asarray(seed, dtype=np.uint64)
    first = philox4x32(counter, (key & _LOW, key >> _WORD))[0]
    return (first >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
