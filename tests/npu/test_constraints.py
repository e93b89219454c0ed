"""Every constraint of the fused products' documents: refused by the simulator, and never met by the backend.

The cells of the table are :data:`tests.npu.constraints.witness.ROWS`. For each there are calls that break it
(:mod:`tests.npu.constraints.violations`), made through torch_npu on simulated cards, and a rule of the witness, which
reads the descriptors that reached CANN: it must see each of those calls, and nothing in whatever the backend issues.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest

from polyaccel.backend import Query, TokenClass
from polyaccel.backend.support import Static
from polyaccel_npu.chip import A2
from polyaccel_npu.fused import refusals
from tests.npu.constraints.violations import CHIPS, LEGAL_ON, VIOLATIONS, Violation
from tests.npu.constraints.witness import ROWS, RULES
from tests.npu.mutants.catalogue import MUTANTS

simulated = os.environ.get("CANNSIM_ACTIVE") == "1"
pytestmark = pytest.mark.skipif(not simulated, reason="descriptors are seen by the simulator alone")

UNSEEN = {
    ("use", "all_reduce"): "no operator knows whether its step is one of decode: the plan decides, and is asked below",
    ("use", "reduce_scatter"): "torch_npu looks for another function, which is not there",
    ("use", "all_gather"): "torch_npu looks for another function, which is not there",
    ("A8W8", "reduce_scatter"): "torch_npu refuses it before CANN is asked",
    ("A8W8", "all_gather"): "torch_npu refuses it before CANN is asked",
    ("CANN/driver", "all_reduce"): "the function is not there",
    ("CANN/driver", "reduce_scatter"): "the function is not there",
    ("CANN/driver", "all_gather"): "the function is not there",
}
"""Cells whose violations never reach an aclnn function, and why."""

REFUSED = "test_constraints::test_the_simulator_refuses_it_as_cann_does"
ON_910B, ON_A3, ON_310P = (
    f"test_constraints_kept::test_no_call_on_{chip}_breaks_a_row" for chip in ("910b", "a3", "310p")
)
DOCUMENTED = "test_fused_rules::test_nothing_is_fused_that_the_document_does_not_allow"


@dataclass(frozen=True)
class Covered:
    """Who looks after a row.

    Attributes:
        refused: the tests that the simulator refuses what breaks it.
        kept: those that the backend never does.
        mutant: a planted bug by which the backend would; empty where none of one edit could.
    """

    refused: tuple[str, ...]
    kept: tuple[str, ...]
    mutant: str


TABLE: Mapping[str, Covered] = MappingProxyType(
    {
        "chips": Covered((REFUSED,), (ON_A3, ON_310P, DOCUMENTED), "fused.a3"),
        "world size": Covered((REFUSED,), (ON_910B, ON_A3, DOCUMENTED), "fused.three_ranks"),
        "x1": Covered((REFUSED,), (ON_910B,), "operands.no_contiguous"),
        "x2": Covered((REFUSED,), (ON_910B,), "operands.x2_strided"),
        "k": Covered((REFUSED,), (ON_910B, DOCUMENTED), "fused.long_k"),
        "empty tensors": Covered((REFUSED,), (ON_910B,), "fused.empty"),
        "bias": Covered((REFUSED,), (ON_910B,), "fused.bias_strided"),
        "reduce_op / comm_turn": Covered((REFUSED,), (ON_910B,), "fused.max"),
        "comm domain": Covered((REFUSED,), (ON_910B, DOCUMENTED), "fused.two_communicators"),
        "use": Covered(
            (REFUSED, "test_constraints::test_the_plan_refuses_the_fused_product_at_decode_as_its_document_advises"),
            (ON_910B, DOCUMENTED),
            "fused.decode",
        ),
        "A16W8": Covered((REFUSED,), (ON_910B,), ""),
        "A8W8": Covered((REFUSED,), (ON_910B,), ""),
        "CANN/driver": Covered(
            (REFUSED,),
            ("test_constraints_kept::test_a_cann_without_the_fused_function_is_refused_before_anything_runs",),
            "",
        ),
    }
)
"""By row. The witness is asked about all rows in each of the tests of what is kept."""


@functools.cache
def report(chip: str, cann: str, own: str) -> dict[str, dict[str, Any]]:
    """What the calls of one machine came to. One process each: cards of another kind need one of their own."""
    environment = {**os.environ, "CANNSIM_SOC": chip, "ASCEND_LAUNCH_BLOCKING": "1"}
    environment |= {"CANNSIM_CANN": cann} if cann else {}
    child = subprocess.run(
        [sys.executable, "-m", "tests.npu.constraints.violations", *([own] if own else [])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


def of(violation: Violation) -> dict[str, Any]:
    return report(*violation.process)[violation.key]


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda violation: violation.key)
def test_the_simulator_refuses_it_as_cann_does(violation: Violation) -> None:
    found = of(violation)
    assert violation.words in found["refusal"]
    assert found["code"] == violation.code
    if violation.code:
        assert f"error code is {violation.code}" in found["refusal"]
        assert "ERR00100 PTA call acl api failed" in found["refusal"]
        assert ("EZ1001" if violation.code in (161001, 161002) else "EZ9999") in found["refusal"]
    elif found["reached"]:
        assert "EZ9999" in found["refusal"], "what the device alone can see is an inner error"
    else:
        assert "ERR010" in found["refusal"], "op-plugin's own refusals are those of module OPS"


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda violation: violation.key)
def test_the_witness_sees_in_the_descriptors_what_is_refused(violation: Violation) -> None:
    found = of(violation)
    if found["reached"]:
        assert violation.row in found["broken"]
    else:
        assert not found["code"]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_legal_calls_pass_and_the_witness_has_nothing_against_them(chip: str) -> None:
    found = report(chip, "", "")
    for name in LEGAL_ON[chip]:
        entry = found[f"legal {name}"]
        assert (entry["refusal"], entry["broken"]) == ("", [])
        assert entry["reached"]


def test_the_plan_refuses_the_fused_product_at_decode_as_its_document_advises() -> None:
    class Group:
        def fused_refusals(self) -> list[str]:
            return []

    static: dict[str, Static] = {"world_size": 2, "dtype": "float16", "k": 64}
    for token_class in TokenClass:
        query = Query(site="o", operator="row_parallel_linear", token_class=token_class, adapters=False, static=static)
        found = refusals(query, [Group()], [A2.family], True)  # type: ignore[list-item]
        assert [("decode" in reason) for reason in found] == [True] * (token_class is TokenClass.DECODE)


def test_every_row_has_a_test_of_its_refusal_and_one_that_it_is_never_broken() -> None:
    assert list(TABLE) == list(ROWS)
    for row, covered in TABLE.items():
        for name in (*covered.refused, *covered.kept):
            module, _, test = name.partition("::")
            assert callable(getattr(importlib.import_module(f"tests.npu.{module}"), test, None)), f"{row}: no {name}"
        assert covered.mutant in ("", *MUTANTS), f"{row}: no mutant {covered.mutant}"


def test_every_cell_of_the_table_has_calls_that_break_it_and_a_rule_of_the_witness() -> None:
    assert set(RULES) == set(ROWS)
    cells = {(row, column) for row, columns in ROWS.items() for column in columns}
    assert {(violation.row, violation.column) for violation in VIOLATIONS} == cells
    seen = {(v.row, v.column) for v in VIOLATIONS if of(v)["reached"]}
    assert cells - seen == set(UNSEEN)
    assert len({violation.key for violation in VIOLATIONS}) == len(VIOLATIONS)
