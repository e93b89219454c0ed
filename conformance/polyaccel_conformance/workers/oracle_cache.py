"""Expected results that are kept for the next case with the same data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from polyaccel_conformance.case import Case
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Exactly, Problem

Results = Mapping[str, Expected | Exactly]

IRRELEVANT = ("device", "stream", "skew")
"""Axes beside the layouts that decide how a call is made, not what is computed."""


class OracleCache:
    """The last results, up to ``limit`` bytes of float64 values. One a worker."""

    def __init__(self, limit: int = 64 << 20) -> None:
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[str, Results] = OrderedDict()
        self.hits = 0

    def attach(self, problem: Problem) -> None:
        """Make ``problem.expected()`` ask here first."""
        key = data_key(problem.case)
        compute = problem.expected

        def expected() -> Results:
            found = self._kept.get(key)
            if found is not None:
                self.hits += 1
                self._kept.move_to_end(key)
                return found
            computed = compute()
            self._keep(key, computed)
            return computed

        problem.expected = expected  # type: ignore[method-assign]

    def _keep(self, key: str, results: Results) -> None:
        size = _size(results)
        if size > self._limit // 4 or any(callable(r.values) for r in results.values() if isinstance(r, Exactly)):
            # A verdict by a function may keep state of its problem.
            return
        self._kept[key] = results
        self._bytes += size
        while self._bytes > self._limit:
            _, old = self._kept.popitem(last=False)
            self._bytes -= _size(old)


def data_key(case: Case) -> str:
    """Equal for cases that compute the same from the same data."""
    axes = {p: v for p, v in case.axes().items() if p not in IRRELEVANT and not p.startswith("layouts.")}
    return Case.of(case.operator, MappingProxyType(axes), case.seed).key


def _size(results: Results) -> int:
    total = 0
    for result in results.values():
        if isinstance(result, Expected):
            total += (2 + len(result.terms)) * result.value.nbytes
        else:
            total += np.asarray(result.values).nbytes
    return total
