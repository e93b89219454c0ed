"""Every check, by name, in the order in which they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel_conformance.check import Check
from polyaccel_conformance.checks.comm import COMM_CHECKS
from polyaccel_conformance.checks.groups import GROUP_CHECKS
from polyaccel_conformance.checks.values import VALUE_CHECKS

CHECKS: Mapping[str, Check] = MappingProxyType({**VALUE_CHECKS, **COMM_CHECKS, **GROUP_CHECKS})
