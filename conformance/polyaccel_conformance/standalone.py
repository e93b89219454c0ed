"""A case as one script that needs torch and numpy alone, for whoever wrote the kernel."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.casefile import CaseFile
from polyaccel_conformance.dump import inputs_of
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.harness.layouts import place
from polyaccel_conformance.problem import Problem

MAX_BYTES = 8 << 20
TEXTS = ("case", "error", "attributes")


def standalone(file: CaseFile, problem: Problem, archive: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """The script's text.

    Args:
        archive: the arrays that ``--dump`` writes for the same case, outputs of the failing backend included.

    Raises:
        UsageError: the case is too large to be put into a script; ``--dump`` writes any.
    """
    kept = {name: values for name, values in archive.items() if name not in TEXTS}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **kept)
    if buffer.tell() > MAX_BYTES:
        raise UsageError(
            f"the case's arrays take {buffer.tell()} bytes; a script holds {MAX_BYTES} at most: use --dump"
        )
    spec = problem.spec
    inputs: dict[str, Any] = {}
    for name, operand in inputs_of(problem).items():
        inputs[name] = _placed(operand.dtype, operand.shape, file.case.layout(name))
    for name in archive:
        if name.startswith("input.") and (short := name.removeprefix("input.")) not in inputs:
            # Of the step or a table.
            inputs[short] = _placed(archive[name].dtype.name, archive[name].shape, "contiguous")
    error = archive.get("error")
    failure = file.failure
    facts = {
        "operator": spec.name,
        "semantics": spec.semantics,
        "arguments": [f"{argument.name}: {argument.shape or argument.kind}" for argument in spec.arguments],
        "returns": spec.returns,
        "case": {**file.case.axes(), "arguments": json.loads(str(archive["attributes"]))},
        "seen": f"{failure.check} failed on {file.subject.label}: {failure.message}",
        "error": "" if error is None else str(error),
        "output_dtype": file.case.dtype,
    }
    data = "\n".join(textwrap.wrap(base64.b64encode(buffer.getvalue()).decode(), 116))
    return Template(_SCRIPT).substitute(
        title=f"{spec.name}: {failure.check} failed, {failure.cause}",
        facts=json.dumps(facts, indent=4).replace("\\", "\\\\"),
        inputs=json.dumps(inputs).replace("\\", "\\\\"),
        data=data,
    )


def _placed(dtype: str, shape: tuple[int, ...], layout: str) -> dict[str, Any]:
    where = place(shape, layout, 64)
    return {
        "dtype": dtype,
        "shape": shape,
        "strides": where.strides,
        "offset": where.offset,
        "span": where.span,
    }


def write_standalone(
    path: Path, file: CaseFile, problem: Problem, archive: Mapping[str, npt.NDArray[np.generic]]
) -> None:
    """As an executable Python file."""
    path.write_text(standalone(file, problem, archive), encoding="utf-8")
    path.chmod(0o755)


_SCRIPT = '''#!/usr/bin/env python3
"""$title.

Needs torch and numpy alone.

    python THIS.py                              what the failing implementation returned, against what is right
    python THIS.py kernel.py:function           run function(inputs, case), compare what it returns
    python THIS.py kernel.py:function cuda:0    the same on a device

``inputs``: tensors by name, in the layouts of the case; ``step.<name>`` are the arrays of the step, with the triples of
adapters as ``step.<row set>.rows``, ``.slots`` and ``.weights``. ``case``: sizes by axis, and ``arguments``, the values
of attributes. The function returns one tensor, or a dictionary of them by output name. Exit code 0: right, 1: wrong.
"""

import base64
import importlib.util
import io
import json
import sys

import numpy as np
import torch

FACTS = json.loads("""$facts""")
INPUTS = json.loads("""$inputs""")
DATA = """
$data
"""
DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")
}


def load(device):
    """The inputs on a device, each in its layout within a larger buffer of NaN."""
    archive = np.load(io.BytesIO(base64.b64decode(DATA)), allow_pickle=False)
    tensors = {}
    for name, where in INPUTS.items():
        dtype = DTYPES[where["dtype"]]
        fill = float("nan") if dtype.is_floating_point else 0
        buffer = torch.full((where["span"] + 64,), fill, dtype=torch.float64).to(dtype)
        view = buffer.as_strided(where["shape"], where["strides"], where["offset"])
        view.copy_(torch.from_numpy(archive["input." + name].copy()).to(dtype))
        tensors[name] = buffer.to(device).as_strided(where["shape"], where["strides"], where["offset"])
    return archive, tensors


def compare(archive, name, got):
    """Print the worst element; True if all are within tolerance."""
    if "expected." + name not in archive:
        print(f"{name}: several results are right; not judged here")
        return True
    expected = archive["expected." + name]
    if got.shape != expected.shape:
        print(f"{name}: shape {got.shape}, expected {expected.shape}")
        return False
    got = got.astype(np.float64)
    tolerance = archive["tolerance." + name] if "tolerance." + name in archive else np.zeros(expected.shape)
    expected = expected.astype(np.float64)
    if not got.size:
        return True
    with np.errstate(all="ignore"):
        error = np.abs(got - expected)
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        ratio = np.where(same, 0.0, np.where(tolerance > 0, error / tolerance, np.inf))
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        # An infinity is right where rounding may reach it.
        largest = float(torch.finfo(DTYPES[FACTS["output_dtype"]]).max)
        over = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) + tolerance >= largest)
        ratio = np.where(over, 0.0, ratio)
    worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    index = tuple(int(i) for i in worst)
    wrong = int((ratio > 1).sum())
    print(f"{name}: {wrong} of {ratio.size} elements wrong; worst err / tol {float(ratio[worst]):.3g} at {index}:")
    print(f"    got {got[worst]:.9g}, expected {expected[worst]:.9g}, tolerance {float(tolerance[worst]):.3g}")
    return wrong == 0


def main():
    for key in ("operator", "semantics", "arguments", "returns", "seen"):
        print(f"{key}: {FACTS[key]}")
    print("case:", json.dumps(FACTS["case"]))
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    archive, tensors = load(device)
    if len(sys.argv) < 2:
        if FACTS["error"]:
            print("the failing implementation raised", FACTS["error"])
            return 1
        outputs = {name[4:]: archive[name] for name in archive.files if name.startswith("got.")}
        if not outputs:
            print("the failing implementation returned nothing")
            return 1
    else:
        path, _, function = sys.argv[1].partition(":")
        spec = importlib.util.spec_from_file_location("candidate", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        result = getattr(module, function)(tensors, FACTS["case"])
        if not isinstance(result, dict):
            names = [name[9:] for name in archive.files if name.startswith("expected.")]
            result = dict(zip(names, result if isinstance(result, tuple) else (result,)))
        outputs = {name: tensor.detach().to("cpu").to(torch.float64).numpy() for name, tensor in result.items()}
    missing = [name[9:] for name in archive.files if name.startswith("expected.") and name[9:] not in outputs]
    if missing:
        print("not returned, not judged:", ", ".join(missing))
    verdicts = [compare(archive, name, got) for name, got in outputs.items()]
    return 0 if verdicts and all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
'''
