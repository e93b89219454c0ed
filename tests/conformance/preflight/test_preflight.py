"""The preflight says everything at once, whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from polyaccel.backend import Device, TorchDevice
from polyaccel_conformance.preflight.aten import Sample, execute_on
from polyaccel_conformance.preflight.facts import device_findings
from polyaccel_conformance.preflight.finding import Finding, Mark, Preflight
from polyaccel_conformance.preflight.run import preflight
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.subject import Subject

FEW: Mapping[str, ProblemSet] = {name: PROBLEM_SETS[name] for name in ("linear", "rms_norm", "gelu", "layer_norm")}
ENTRIES = """
import torch
from polyaccel.backend import Availability, Backend, TorchDevice
from polyaccel.backend.composite.linear import dequantize, linear

class Plain(Backend):
    name, priority = "plain", None
    def probe(self): return Availability(usable=True)
    def devices(self): return (TorchDevice("cpu"),)
    def operators(self): return {"linear": linear, "dequantize": dequantize}

class Careless(Plain):
    def probe(self): raise RuntimeError("no driver")
    def devices(self): return ()
    def operators(self): return {"linear": linear}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "backends.py"
    path.write_text(ENTRIES, encoding="utf-8")
    return path


def by_name(found: Preflight) -> dict[str, Finding]:
    return {finding.name: finding for finding in found.findings}


def test_the_cpu_backend_passes_and_lacks_nothing() -> None:
    found = preflight(Subject(name="cpu"), FEW, examine=True)
    assert found.passed
    assert found.seconds < 20
    assert {row.operator for row in found.table} >= set(FEW)
    assert "aten.mm" in next(row for row in found.table if row.operator == "linear").needs


def test_the_null_backend_fails_by_its_device() -> None:
    found = preflight(Subject(name="null"), FEW)
    assert not found.usable
    assert by_name(found)["stores float32"].mark is Mark.FAIL


def test_a_backend_that_is_not_installed_is_named_with_those_that_are() -> None:
    found = preflight(Subject(name="nosuch"), FEW)
    assert not found.opened
    assert "installed are" in by_name(found)["discovery"].detail


def test_all_that_is_wrong_is_said_at_once(table: Path) -> None:
    found = preflight(Subject(kind="table", name="Careless", path=str(table)), FEW)
    failed = {finding.name for finding in found.failures}
    assert {"probe", "operators", "devices"} <= failed


def lacking(*names: str) -> object:
    def execute(sample: Sample, device: Device) -> None:
        if sample.name in names:
            raise NotImplementedError(
                f"Could not run '{sample.name}' with arguments from the 'Acme' backend\nmore text"
            )
        execute_on(sample, device)

    return execute


def test_aten_operators_that_the_device_lacks_are_listed_by_operator_and_level(table: Path) -> None:
    subject = Subject(kind="table", name="Plain", path=str(table))
    found = preflight(subject, FEW, execute=lacking("aten.rsqrt", "aten.gelu"), examine=True)  # type: ignore[arg-type]
    rows = {row.operator: row for row in found.lacking}
    assert set(rows) == {"rms_norm", "gelu", "layer_norm"}
    assert rows["rms_norm"].levels == ("L2",)
    assert "'Acme' backend" in rows["rms_norm"].missing["aten.rsqrt"]
    assert "more text" not in rows["rms_norm"].missing["aten.rsqrt"]
    assert not found.passed
    assert found.usable
    assert "aten.gelu" in found.text()
    json.dumps(found.to_json())


def test_all_that_is_lacking_is_one_table_in_the_order_of_the_levels(table: Path) -> None:
    subject = Subject(kind="table", name="Plain", path=str(table))
    sets = {name: PROBLEM_SETS[name] for name in ("gelu", "moe_route", "sgmv_shrink")}
    absent = {"gelu", "erf", "tanh", "softmax", "_softmax", "mm", "addmm", "topk", "sort"}

    def execute(sample: Sample, device: Device) -> None:
        if sample.name.split(".")[1] in absent:
            raise NotImplementedError("not on this device")
        execute_on(sample, device)

    found = preflight(subject, sets, execute=execute, examine=True)
    lines = found.text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("  levels "))
    levels = [line.split()[0] for line in lines[begin + 1 :] if line.startswith("  L")]
    assert levels == sorted(levels)
    assert {"L2", "L3", "L4"} <= set(levels)
    assert all(any(name in line for line in lines[begin:]) for row in found.lacking for name in row.missing)


def test_a_device_too_slow_to_try_everything_on_is_said_and_ends_in_time(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyaccel_conformance.preflight.run.ON_DEVICE", 0.0)
    found = preflight(Subject(kind="table", name="Plain", path=str(table)), FEW, examine=True)
    assert all("there was no time for" in row.unknown and not row.missing for row in found.table)
    assert "note  linear: there was no time for" in found.text()


def calls_made(table: Path, sets: Mapping[str, ProblemSet]) -> int:
    made = 0

    def execute(sample: Sample, device: Device) -> None:
        nonlocal made
        made += 1

    preflight(Subject(kind="table", name="Plain", path=str(table)), sets, execute=execute, examine=True)
    return made


def test_a_call_that_several_operators_need_is_made_once(table: Path) -> None:
    norms = {name: FEW[name] for name in ("rms_norm", "layer_norm")}
    alone = [calls_made(table, {name: problems}) for name, problems in norms.items()]
    assert max(alone) <= calls_made(table, norms) < sum(alone)


def test_what_a_backend_has_of_its_own_needs_no_composite(table: Path) -> None:
    subject = Subject(kind="table", name="Plain", path=str(table))
    found = preflight(subject, FEW, execute=lacking("aten.mm", "aten.addmm"), examine=True)  # type: ignore[arg-type]
    assert found.passed
    assert next(row for row in found.table if row.operator == "linear").missing


def test_more_devices_than_there_are_is_a_failure() -> None:
    class Two(TorchDevice):
        pass

    from polyaccel_conformance.preflight.run import _devices

    class Backend:
        def devices(self) -> Sequence[Device]:
            return (Two("cpu", index=0), Two("cpu", index=1))

    _, lines = _devices(Backend(), 4)  # type: ignore[arg-type]
    assert any("4 devices were asked for, there are 2" in line.detail for line in lines)


class Without(TorchDevice):
    """Loses what its name says."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__("cpu")
        self._dtypes = dtypes

    def upload(self, source: object) -> torch.Tensor:
        tensor = super().upload(source)  # type: ignore[arg-type]
        if tensor.dtype in self._dtypes:
            raise TypeError(f"{tensor.dtype} is not storable")
        return tensor


class Scrubbing(TorchDevice):
    """Replaces every NaN by one of its own."""

    def upload(self, source: object) -> torch.Tensor:
        tensor = super().upload(source)  # type: ignore[arg-type]
        return torch.where(tensor.isnan(), torch.nan, tensor) if tensor.dtype.is_floating_point else tensor


def facts(device: Device) -> dict[str, Mark]:
    from polyaccel.backend import load

    return {finding.name: finding.mark for finding in device_findings(load("cpu"), device)}


def test_float64_and_int64_are_never_required() -> None:
    marks = facts(Without(torch.float64, torch.int64))
    assert marks["stores float64"] is marks["stores int64"] is marks["int64 indices"] is Mark.ABSENT
    assert Mark.FAIL not in marks.values()


def test_one_16_bit_type_is_enough_and_none_is_too_few() -> None:
    assert facts(Without(torch.float16))["stores a 16-bit type"] is Mark.OK
    assert facts(Without(torch.float16, torch.bfloat16))["stores a 16-bit type"] is Mark.FAIL


def test_a_copy_that_changes_nan_payloads_is_a_failure() -> None:
    assert facts(Scrubbing("cpu"))["copies keep NaN payloads"] is Mark.FAIL
    assert facts(TorchDevice("cpu"))["copies keep NaN payloads"] is Mark.OK
