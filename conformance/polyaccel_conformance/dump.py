"""The arrays of a case as a NumPy archive: what went in, what had to come out, what came out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polyaccel.backend import Step, Weight
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import DEVICE_ARRAYS
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Prepared, Problem
from polyaccel_conformance.trial import Trial

Array = npt.NDArray[np.generic]
DEPTH = 4


def dump(bench: Bench, problem: Problem, path: Path, *, run: bool = True) -> None:
    """Run the case once, unless it must not be, and write the archive.

    Names: ``input.<name>`` (exact values, float64 or int64; a step's arrays as ``input.step.<name>``, rotary tables as
    ``input.rope.<name>``), ``attributes`` (JSON), ``expected.<output>``, ``tolerance.<output>`` (0 where
    bits are compared), ``term.<output>.<name>`` (what the tolerance is made of), ``got.<output>``, ``case`` (JSON).
    """
    np.savez_compressed(path, allow_pickle=False, **arrays(bench, problem, run=run))


def arrays(bench: Bench, problem: Problem, *, run: bool = True) -> dict[str, Array]:
    """Everything that :func:`dump` writes, by name."""
    found: dict[str, Array] = {"case": np.asarray(json.dumps(problem.case.to_json()))}
    for name, operand in inputs_of(problem).items():
        found[f"input.{name}"] = operand.values
    trial = Trial(bench, problem)
    found |= _surroundings(trial.prepare())
    for name, expected in trial.expected.items():
        if isinstance(expected, Expected):
            found[f"expected.{name}"] = expected.value
            found[f"tolerance.{name}"] = expected.tolerance
            for term, values in expected.terms:
                key = f"term.{name}.{term}"
                found[key] = found[key] + values if key in found else np.asarray(values)  # type: ignore[operator]
        elif not callable(expected.values):
            found[f"expected.{name}"] = np.asarray(expected.values)
    if not run:
        return found
    observation = trial.observe()
    for name, output in observation.outputs.items():
        found[f"got.{name}"] = output.values
    if observation.error is not None:
        found["error"] = np.asarray(f"{type(observation.error).__name__}: {observation.error}")
    return found


def _surroundings(prepared: Prepared) -> dict[str, Array]:
    """What a kernel needs to know beside its tensors: attributes, the step's arrays, rotary tables."""
    found: dict[str, Array] = {}
    attributes: dict[str, object] = {}
    for name, value in prepared.arguments.items():
        if isinstance(value, Step):
            for array in DEVICE_ARRAYS:
                found[f"input.{name}.{array}"] = np.asarray(getattr(value.input, array))
            for row_set, rows in value.input.adapters.items():
                for part in ("rows", "slots", "weights"):
                    found[f"input.{name}.{row_set}.{part}"] = np.asarray(getattr(rows, part))
        elif isinstance(value, RopeTable):
            found[f"input.{name}.cos"] = value.cos.cpu().numpy()
            found[f"input.{name}.sin"] = value.sin.cpu().numpy()
            attributes |= {"rotary_dim": value.rotary_dim, "style": value.style}
        elif isinstance(value, Weight):
            attributes[name] = {"slices": [piece.n for piece in value.spec.slices], "k": value.spec.k}
        elif value is None or isinstance(value, int | float | str | bool | tuple | list):
            attributes[name] = value
    found["attributes"] = np.asarray(json.dumps(attributes))
    return found


def inputs_of(problem: Problem) -> dict[str, Operand]:
    """The tensor arguments by name, then what lies in weights, caches and adapters by attribute path."""
    found: dict[str, Operand] = dict(problem.operands)
    held = {id(operand) for operand in found.values()}
    for name, value in vars(problem).items():
        if name != "operands":
            for path, operand in _operands(name.lstrip("_"), value, DEPTH):
                if id(operand) not in held:
                    found[path] = operand
                    held.add(id(operand))
    return found


def _operands(path: str, value: object, depth: int) -> Iterator[tuple[str, Operand]]:
    if isinstance(value, Operand):
        yield path, value
    elif depth == 0 or isinstance(value, str | bytes | np.ndarray):
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _operands(f"{path}.{key}", item, depth - 1)
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            yield from _operands(f"{path}.{index}", item, depth - 1)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _operands(f"{path}.{field.name}", getattr(value, field.name, None), depth - 1)
