"""Every check, by name, in the order in which they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel_conformance.check import Check
from polyaccel_conformance.checks.alias import ALIAS_CHECKS
from polyaccel_conformance.checks.comm import COMM_CHECKS
from polyaccel_conformance.checks.device import DEVICE_CHECKS
from polyaccel_conformance.checks.device_sets import DEVICE_QUESTIONS
from polyaccel_conformance.checks.errors import ERROR_CHECKS
from polyaccel_conformance.checks.evidence import EVIDENCE_CHECKS
from polyaccel_conformance.checks.graph import GRAPH_CHECKS
from polyaccel_conformance.checks.groups import GROUP_CHECKS
from polyaccel_conformance.checks.invariance import INVARIANCE_CHECKS
from polyaccel_conformance.checks.layout import LAYOUT_CHECKS
from polyaccel_conformance.checks.lora_cost import LORA_COST_CHECKS
from polyaccel_conformance.checks.lora_evidence import LORA_EVIDENCE_CHECKS
from polyaccel_conformance.checks.memory import MEMORY_CHECKS
from polyaccel_conformance.checks.nonfinite import NON_FINITE_CHECKS
from polyaccel_conformance.checks.numerics import NUMERICS_CHECKS
from polyaccel_conformance.checks.operands import OPERAND_CHECKS
from polyaccel_conformance.checks.stream import STREAM_CHECKS
from polyaccel_conformance.checks.support import SUPPORT_CHECKS
from polyaccel_conformance.checks.tp import TP_CHECKS
from polyaccel_conformance.checks.values import VALUE_CHECKS
from polyaccel_conformance.models.layers import LAYER_CHECKS
from polyaccel_conformance.models.questions import MODEL_CHECKS

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        **VALUE_CHECKS,
        **DEVICE_QUESTIONS,
        **MEMORY_CHECKS,
        **LAYOUT_CHECKS,
        **ALIAS_CHECKS,
        **EVIDENCE_CHECKS,
        **INVARIANCE_CHECKS,
        **NUMERICS_CHECKS,
        **NON_FINITE_CHECKS,
        **DEVICE_CHECKS,
        **STREAM_CHECKS,
        **ERROR_CHECKS,
        **GRAPH_CHECKS,
        **LORA_EVIDENCE_CHECKS,
        **LORA_COST_CHECKS,
        **COMM_CHECKS,
        **GROUP_CHECKS,
        **OPERAND_CHECKS,
        **TP_CHECKS,
        # Last: what a backend does not refuse may cost it its device.
        **SUPPORT_CHECKS,
        **MODEL_CHECKS,
        **LAYER_CHECKS,
    }
)
