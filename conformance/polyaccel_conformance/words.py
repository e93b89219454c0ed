"""Random data that are the same bits on every platform and version.

Counter-based: word ``i`` of stream ``s`` under seed ``k`` is a hash of the three (SplitMix64's finaliser, Steele et al.
2014, applied to a Weyl sequence). Only integer and exactly rounded operations follow: numpy promises no stream across
versions, and libm differs between platforms.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_TERMS = 8
_LANES = np.uint64(0x0000FFFF0000FFFF)


def _mix(z: Words) -> Words:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


class Source:
    """The data of one case: a stream for each name, so that adding an operand changes no other."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def words(self, name: str, count: int) -> Words:
        """``[count]`` uniform 64-bit words of stream ``name``."""
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        start = np.uint64(int.from_bytes(digest[:8], "little"))
        with np.errstate(over="ignore"):
            return _mix(start + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Floats:
        """In [0, 1), multiples of 2^-53."""
        count = int(np.prod(shape, dtype=np.int64))
        uniform: Floats = ((self.words(name, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)
        return uniform

    def normal(self, name: str, shape: tuple[int, ...]) -> Floats:
        """Mean 0, variance 1, close to normal, |x| < 4.9: a scaled sum of eight 16-bit uniforms, exact until the last
        multiplication."""
        count = int(np.prod(shape, dtype=np.int64))
        words = self.words(name, 2 * count)
        # Two lanes of 32 bits each, no carry between them.
        lanes = (words & _LANES) + ((words >> np.uint64(16)) & _LANES)
        lanes = lanes[:count] + lanes[count:]
        total = ((lanes & np.uint64(0xFFFFFFFF)) + (lanes >> np.uint64(32))).astype(np.int64)
        # Variance of a sum of n uniforms on 0..m-1 is n (m^2 - 1) / 12.
        deviation = np.sqrt(_TERMS * (2.0**32 - 1) / 12)
        normal: Floats = ((total - _TERMS * 65535 / 2) / deviation).reshape(shape)
        return normal

    def integers(self, name: str, shape: tuple[int, ...], low: int, high: int) -> Ints:
        """Uniform in ``low..high``, both included."""
        span = np.uint64(high - low + 1)
        count = int(np.prod(shape, dtype=np.int64))
        # The bias of the remainder is below 2^-40 for the small ranges used here.
        return ((self.words(name, count) >> np.uint64(8)) % span).astype(np.int64).reshape(shape) + low

    def permutation(self, name: str, n: int) -> Ints:
        """A permutation of 0..n-1."""
        return np.argsort(self.words(name, n), kind="stable").astype(np.int64)

    def choose(self, name: str, n: int, count: int) -> Ints:
        """``count`` different numbers of 0..n-1, in random order."""
        return self.permutation(name, n)[:count]
