"""The cases of every operator, and of the questions about devices and storage, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel_conformance.checks.device_sets import DEVICE_SETS
from polyaccel_conformance.models.layers import LayersProblems
from polyaccel_conformance.models.questions import QUESTIONS
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.activation import GeluProblems, SiluAndMulProblems
from polyaccel_conformance.problems.attention import DenseAttentionProblems, PagedAttentionProblems
from polyaccel_conformance.problems.dequantize import DequantizeProblems
from polyaccel_conformance.problems.embedding import EmbeddingProblems
from polyaccel_conformance.problems.kv_cache import WriteKVCacheProblems
from polyaccel_conformance.problems.linear import LinearProblems
from polyaccel_conformance.problems.moe_experts import MoeExpertsProblems
from polyaccel_conformance.problems.moe_route import MoeRouteProblems
from polyaccel_conformance.problems.norm import LayerNormProblems, RmsNormProblems
from polyaccel_conformance.problems.rotary import RotaryProblems
from polyaccel_conformance.problems.sample import SampleProblems
from polyaccel_conformance.problems.select_rows import SelectRowsProblems
from polyaccel_conformance.problems.sgmv import ExpandProblems, SgmvProblems, ShrinkProblems
from polyaccel_conformance.problems.stations import ColumnLinearProblems, RowParallelLinearProblems
from polyaccel_conformance.problems.stations_mlp import GateUpActProblems
from polyaccel_conformance.problems.stations_norm import RowParallelAddNormProblems
from polyaccel_conformance.problems.stations_qkv import QkvRopeCacheProblems

PROBLEM_SETS: Mapping[str, ProblemSet] = MappingProxyType(
    {
        s.operator: s
        for s in (
            LinearProblems(),
            RmsNormProblems(),
            LayerNormProblems(),
            RotaryProblems(),
            SiluAndMulProblems(),
            GeluProblems(),
            SelectRowsProblems(),
            WriteKVCacheProblems(),
            PagedAttentionProblems(),
            DenseAttentionProblems(),
            MoeRouteProblems(),
            MoeExpertsProblems(),
            SampleProblems(),
            *DEVICE_SETS.values(),
            *QUESTIONS,
            LayersProblems(),
            EmbeddingProblems(),
            SgmvProblems(),
            ShrinkProblems(),
            ExpandProblems(),
            DequantizeProblems(),
            ColumnLinearProblems(),
            QkvRopeCacheProblems(),
            GateUpActProblems(),
            RowParallelLinearProblems(),
            RowParallelAddNormProblems(),
        )
    }
)
