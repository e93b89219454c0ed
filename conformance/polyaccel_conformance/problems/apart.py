"""One token of a problem on its own: with its operands and adapters, in a step of its own."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from polyaccel.backend import AdapterRows
from polyaccel_conformance.case import Choice
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.problem import Problem

P = TypeVar("P", bound=Problem)


def token(problem: P, row: int, count: int = 1) -> P:
    """A copy with tokens ``row:row + count`` of every operand that has tokens, and of the case."""
    other = problem.beside()
    changes: dict[str, Choice] = {"dims__tokens": count} if "tokens" in problem.case.dims else {}
    if "others" in problem.case.structure:
        changes["structure__others"] = False
    other.case = problem.case.with_(**changes)
    other.operands = {
        name: Operand(operand.values[row : row + count], operand.dtype)
        if problem.spec.argument(name).shape.startswith("[T")
        else operand
        for name, operand in problem.operands.items()
    }
    return other


def triples(rows: AdapterRows, row: int) -> AdapterRows:
    """Those of one row, which is the only one now."""
    return chosen(rows, np.flatnonzero(rows.rows == row))


def chosen(rows: AdapterRows, which: np.ndarray) -> AdapterRows:
    """Some triples of one row, which is the only one now."""
    return AdapterRows.build(np.zeros(len(which), dtype=np.int32), rows.slots[which], rows.weights[which])
