"""Every operator's cases, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.linear import LinearProblems

PROBLEM_SETS: Mapping[str, ProblemSet] = MappingProxyType({s.operator: s for s in (LinearProblems(),)})
