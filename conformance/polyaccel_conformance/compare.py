"""Comparing an output with what is expected: elementwise, overflow included, and what a failure looks like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyaccel_conformance.oracle.bounded import Expected

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """The worst element of a wrong output, and where the wrong ones lie."""

    cause: str
    message: str
    index: tuple[int, ...] = ()
    got: float | None = None
    expected: float | None = None
    error: float | None = None
    tolerance: float | None = None
    term: str = ""
    pattern: str = ""


def excess(expected: Expected, got: Floats) -> Floats:
    """``err / tol`` elementwise; above 1 is wrong, infinite where the kind of number is (NaN, infinity, sign of
    infinity, or any difference under exact comparison)."""
    value, tolerance, out = expected.value, expected.tolerance, expected.format
    ratio = np.zeros_like(value)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = np.abs(got - value)
        if expected.exact:
            same = (got == value) | (np.isnan(got) & np.isnan(value))
            return np.where(same, 0.0, np.inf)
        np.divide(error, tolerance, out=ratio, where=tolerance > 0)
        ratio = np.where((tolerance == 0) & (error > 0), np.inf, ratio)
        if np.isfinite(got).all() and (np.abs(value) + tolerance < out.overflow).all():
            # Only numbers, far from the largest one.
            return ratio
        # Beyond the rounding boundary an infinity is required; within the bound of it either is right.
        beyond = np.abs(value) - tolerance >= out.overflow
        within = ~beyond & (np.abs(value) + tolerance >= out.overflow)
        infinite = np.isinf(got) & (np.sign(got) == np.sign(value))
        ratio = np.where(beyond, np.where(infinite, 0.0, np.inf), ratio)
        ratio = np.where(within & infinite, 0.0, ratio)
        ratio = np.where(~beyond & ~within & ~np.isfinite(got) & np.isfinite(value), np.inf, ratio)
    ratio = np.where(np.isnan(value), np.where(np.isnan(got), 0.0, np.inf), ratio)
    return np.where(np.isnan(ratio), np.inf, ratio)


def compare(expected: Expected, got: Array, dtype: torch.dtype) -> Disagreement | None:
    """None where every element is right."""
    if dtype != expected.format.torch:
        return Disagreement(cause="dtype", message=f"dtype {dtype}, expected {expected.format.torch}")
    if got.shape != expected.value.shape:
        return Disagreement(cause="shape", message=f"shape {got.shape}, expected {expected.value.shape}")
    if not got.size:
        return None
    values = got.astype(np.float64)
    ratio = excess(expected, values)
    wrong = ratio > 1
    if not wrong.any():
        return None
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    value, tolerance = float(expected.value[index]), float(expected.tolerance[index])
    observed = float(values[index])
    error = abs(observed - value)
    terms = {name: float(np.broadcast_to(term, ratio.shape)[index]) for name, term in expected.terms}
    cause = "not a number" if np.isnan(observed) and not np.isnan(value) else "wrong value"
    share = f"{int(wrong.sum())} of {wrong.size}"
    return Disagreement(
        cause=cause,
        message=f"{share} elements wrong; at {index} got {observed:.9g}, expected {value:.9g}",
        index=index,
        got=observed,
        expected=value,
        error=error,
        tolerance=tolerance,
        term=max(terms, key=terms.__getitem__) if terms else "",
        pattern=pattern(wrong),
    )


def headroom(expected: Expected, got: Array) -> float:
    """The worst ``err / tol`` of an output; 0 for an empty one."""
    return float(excess(expected, got.astype(np.float64)).max(initial=0.0))


def pattern(wrong: npt.NDArray[np.bool_]) -> str:
    """Where the wrong elements lie, if that can be said: by axis, the residues or ends that hold all of them."""
    found: list[str] = []
    for axis in range(wrong.ndim):
        size = wrong.shape[axis]
        hit = np.flatnonzero(wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != axis)))
        if len(hit) == size:
            continue
        if len(hit) == 1:
            place = "last" if hit[0] == size - 1 and size > 1 else str(int(hit[0]))
            found.append(f"axis {axis}: {place}")
            continue
        for modulus in (128, 64, 32, 16, 8, 4, 2):
            residues = np.unique(hit % modulus)
            if size > modulus and len(residues) == 1:
                found.append(f"axis {axis}: {int(residues[0])} mod {modulus}")
                break
        else:
            found.append(f"axis {axis}: {int(hit[0])}..{int(hit[-1])}")
    return ", ".join(found) or "everywhere"
