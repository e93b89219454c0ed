"""``device.copy_paths`` on healthy devices, and on devices with one fault each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from polyaccel.backend import Backend, TableBackend, TorchDevice, load
from polyaccel.backend.device import HostCopy, ReadyHostCopy
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, run_case
from polyaccel_conformance.checks.copies import FAR, SOURCES, CopyPaths
from polyaccel_conformance.checks.device_sets import DEVICE_QUESTIONS
from polyaccel_conformance.device_check import DeviceProblem
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems

QUESTION = DEVICE_QUESTIONS["device.copy_paths"]
SUBJECTS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composite": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}


def answers(backend: Backend, count: int = 150) -> list[CaseResult]:
    return [run_case(Bench(backend), p, [QUESTION]) for p in problems(CopyPaths(), count, 71)]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_healthy_devices_copy_bit_by_bit(subject: str) -> None:
    assert [r.failures for r in answers(SUBJECTS[subject]()) if r.failures] == []


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_memory_holds_the_same_values(source: str) -> None:
    axes = {"dtype": "float32", "dims.rows": 3, "dims.columns": 5, "data": "bits"}
    [plain, other] = [
        CopyPaths().problem(Case.of("device.copy_paths", axes | {"structure.source": s, "structure.path": "upload"}, 3))
        for s in ("pageable", source)
    ]
    with plain._source(torch.float32) as (wanted, _), other._source(torch.float32) as (got, reason):  # type: ignore[attr-defined]
        if got is None:
            assert reason.startswith("no pinned memory")
            return
        rows = got if source != "expanded" else got[:1]
        assert torch.equal(rows.contiguous().view(torch.int32), wanted[: len(rows)].view(torch.int32))


def test_far_sources_are_beyond_every_32_bit_offset() -> None:
    axes = {"dtype": "uint8", "dims.rows": 2, "dims.columns": 4, "data": "bits", "structure.path": "upload"}
    for source, element in (("far", 0), ("far_rows", 1)):
        problem = CopyPaths().problem(Case.of("device.copy_paths", axes | {"structure.source": source}, 4))
        with problem._source(torch.uint8) as (tensor, _):  # type: ignore[attr-defined]
            assert tensor is not None
            assert tensor[element].storage_offset() >= FAR > 2**31


class Faulty(TorchDevice):
    """A device with one fault, by name."""

    def __init__(self, fault: str) -> None:
        super().__init__("cpu")
        self.fault = fault

    def upload(self, source: np.ndarray | torch.Tensor) -> torch.Tensor:
        if self.fault == "borrows" and isinstance(source, torch.Tensor):
            return source.detach()
        if self.fault == "flat" and isinstance(source, torch.Tensor) and source.numel():
            size = min(
                source.numel(), source.untyped_storage().nbytes() // source.element_size() - source.storage_offset()
            )
            flat = torch.as_strided(source, (size,), (1,)).clone()
            return torch.cat((flat, flat.new_zeros(source.numel() - size))).view(source.shape)
        copied = super().upload(source)
        if self.fault == "quiets NaN" and copied.dtype is torch.float32:
            return copied + 0.0 if not torch.isnan(copied).any() else torch.nan_to_num(copied, nan=float("nan"))
        if self.fault == "cuts 32 bits" and isinstance(source, torch.Tensor) and source.storage_offset() > 2**20:
            return torch.zeros_like(copied)
        return copied

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        if self.fault == "truncates" and source.dtype is torch.float32 and destination.dtype is torch.bfloat16:
            bits = source.contiguous().view(torch.int32) >> 16
            destination.copy_(bits.to(torch.int16).view(torch.bfloat16))
        elif self.fault == "last element" and destination.numel() > 64:
            destination.view(-1)[:-1].copy_(source.reshape(-1)[:-1])
        else:
            super().copy_(destination, source)

    def download(self, source: torch.Tensor) -> HostCopy:
        return ReadyHostCopy(source.detach().numpy()) if self.fault == "lends" else super().download(source)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return super().zeros(shape, dtype)


@pytest.mark.parametrize(
    "fault", ["borrows", "flat", "quiets NaN", "cuts 32 bits", "truncates", "last element", "lends"]
)
def test_a_faulty_device_is_found(fault: str) -> None:
    found: list[CaseResult] = []
    for result in answers(TableBackend(Faulty(fault), {}), 300):
        found += [result] if result.failures else []
    assert found
    assert {f.check for r in found for f in r.failures} == {"device.copy_paths"}


def test_what_a_device_does_not_offer_is_noted_and_not_passed_over_in_silence() -> None:
    axes = {"dtype": "float32", "dims.rows": 2, "dims.columns": 2, "data": "bits", "structure.path": "upload"}
    problem = CopyPaths().problem(Case.of("device.copy_paths", axes | {"structure.source": "pinned"}, 5))
    assert isinstance(problem, DeviceProblem)
    assert run_case(Bench(load("cpu")), problem, [QUESTION]).passed
    assert torch.cuda.is_available() or problem.notes
