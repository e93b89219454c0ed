"""The files of a new backend's package. ``@name@`` and its like are replaced; everything else is written as it is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MODULE = '''"""polyaccel backend "@name@" for torch devices of type "@device@"."""

import os
from collections.abc import Mapping, Sequence

import torch

from polyaccel.backend import Availability, Backend, Device, Event, TorchDevice
from polyaccel.backend.backend import Implementations
from polyaccel.backend.composite.linear import dequantize, linear

# @VARIABLE@=cpu lets the tests run where the hardware is not.
TYPE = os.environ.get("@VARIABLE@", "@device@")


class @Class@Device(TorchDevice):
    def synchronize(self) -> None:
        if TYPE != "cpu":
            torch.accelerator.synchronize(self.torch_device)

    def record(self) -> Event:
        # Right, but it waits. Return an Event of your queue instead as soon as steps should overlap.
        self.synchronize()
        return super().record()


class @Class@Backend(Backend):
    name = "@name@"
    priority = None  # A number lets backend="auto" choose it: the usable backend with the highest wins.

    def probe(self) -> Availability:
        try:
            torch.empty(1, device=TYPE)
        except Exception as error:
            return Availability(usable=False, reason=f"torch has no usable device {TYPE!r}: {error}")
        return Availability(usable=True, hardware=TYPE != "cpu", devices=tuple(d.name for d in self.devices()))

    def devices(self) -> Sequence[Device]:
        names = [f"{TYPE}:{i}" for i in range(torch.get_device_module(TYPE).device_count())]
        return [@Class@Device(name, index=i) for i, name in enumerate(["cpu"] if TYPE == "cpu" else names)]

    def operators(self) -> Mapping[str, Implementations]:
        # All else runs as a composite: plain torch on the device. Next step, a first operator of your own:
        #     "silu_and_mul": Entry(self._silu_and_mul, evidence=("aten::silu", "aten::mul")),
        return {"linear": linear, "dequantize": dequantize}

    # def _silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
    #     return self.launcher.launch("@name@.silu_and_mul", (x,), my_kernel, x)
'''

PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "polyaccel-@name@"
version = "0.1.0"
description = "polyaccel backend for @device@ devices"
requires-python = ">=3.11"
dependencies = ["polyaccel"]

[project.optional-dependencies]
test = ["polyaccel[conformance]", "pytest"]

[project.entry-points."polyaccel.backends"]
@name@ = "polyaccel_@module@:@Class@Backend"

[project.entry-points."polyaccel.backend_api"]
@name@ = "@api@:@api@"

[tool.setuptools]
py-modules = ["polyaccel_@module@"]
"""

TEST = '''"""The contract, asked of this backend: one test for each operator. Needs the extra "test"."""

from polyaccel_conformance.suite import *  # noqa: F403

BACKEND = "@name@"
PROFILE = "quick"
'''

README = """# polyaccel-@name@

A polyaccel backend for torch devices of type `@device@`.

    python -m pip install -e ".[test]"
    polyaccel conformance preflight --backend @name@
    polyaccel conformance run --backend @name@ --profile quick
    pytest

Without the hardware, `@VARIABLE@=cpu` in front of each command runs it on the CPU.
"""

WORKFLOW = """name: conformance
on: [push, pull_request]
jobs:
  conformance:
    # On a runner with the hardware, remove the variable.
    runs-on: ubuntu-latest
    env:
      @VARIABLE@: cpu
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      - run: python -m pip install -e ".[test]"
      - run: polyaccel conformance preflight --backend @name@
      - run: pytest
"""

FILES: Mapping[str, str] = MappingProxyType(
    {
        "pyproject.toml": PROJECT,
        "README.md": README,
        "polyaccel_@module@.py": MODULE,
        "tests/test_conformance.py": TEST,
        ".github/workflows/conformance.yml": WORKFLOW,
    }
)
"""By path inside the package's folder."""
