"""``device.copy_paths``: whatever lies in host memory arrives bit by bit, from every kind of memory (F3)."""

from __future__ import annotations

import mmap
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from polyaccel.backend import Device
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.device_check import DeviceCheck, DeviceProblem, Facts
from polyaccel_conformance.formats import FORMATS, from_torch, to_torch
from polyaccel_conformance.problem import Problem

FAR = 2**31 + 2**20
"""Bytes before the data of a far source: no 32-bit offset reaches them."""

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int64": torch.int64,
}
OPTIONAL = ("int64",)
"""What a device need not be able to store."""

SOURCES = ("pageable", "offset", "strided", "expanded", "pinned", "mapped", "far", "far_rows", "numpy")
PATHS = ("upload", "copy", "copy_to_view", "on_device", "download", "cast")


class CopyProblem(DeviceProblem):
    """One path from one kind of memory.

    Contents are all bit patterns, NaN with payloads, infinities and subnormals included; a copy that changes the dtype
    rounds to nearest and keeps NaN a NaN, whatever its payload.
    """

    def drive(self, bench: Bench, facts: Facts) -> None:
        dtype = DTYPES[self.case.dtype]
        if self.case.dtype in OPTIONAL and not _stores(bench.device, dtype):
            facts.notes.append(f"{self.case.dtype} is not stored")
            return
        with self._source(dtype) as (source, reason):
            if source is None:
                facts.notes.append(reason)
                return
            _PATHS[str(self.case.structure["path"])](self, bench, source, facts)

    # -- paths ---------------------------------------------------------------------------------------------------------

    def _upload(self, bench: Bench, source: torch.Tensor, facts: Facts) -> None:
        wanted = source.clone()
        given: torch.Tensor | np.ndarray = source
        if self.case.structure["source"] == "numpy" and source.dtype is not torch.bfloat16:
            given = source.numpy()
        copied = bench.device.upload(given)
        if self._writable:
            # The contract: the source may be reused when this returns.
            source.copy_(_inverted(source))
        if self.sabotaged:
            copied.copy_(_inverted(wanted))
        bench.synchronize()
        facts.check("upload: on the device", _is_on(copied, bench.torch_device), f"on {copied.device}")
        facts.same("upload: bits", copied, wanted)

    def _copy(self, bench: Bench, source: torch.Tensor, facts: Facts) -> None:
        destination = bench.device.zeros(tuple(source.shape), source.dtype)
        bench.device.copy_(destination, source)
        bench.synchronize()
        facts.same("copy: bits", destination, source)

    def _copy_to_view(self, bench: Bench, source: torch.Tensor, facts: Facts) -> None:
        """Into the middle of a larger tensor, every second column: nothing else may change."""
        rows, columns = source.shape
        base = bench.upload(_pattern(self, "around", (rows + 2, 2 * columns + 3), source.dtype))
        wanted = base.to("cpu", copy=True)
        bench.device.copy_(base[1 : rows + 1, 1 : 2 * columns + 1 : 2], source)
        bench.synchronize()
        wanted[1 : rows + 1, 1 : 2 * columns + 1 : 2] = source
        facts.same("copy to a view: bits, and what lies around", base, wanted)

    def _on_device(self, bench: Bench, source: torch.Tensor, facts: Facts) -> None:
        """From a transposed device tensor."""
        there = bench.device.upload(source)
        destination = bench.device.zeros((source.shape[1], source.shape[0]), source.dtype)
        bench.device.copy_(destination, there.T)
        bench.synchronize()
        facts.same("copy on the device: bits", destination, source.T.contiguous())

    def _download(self, bench: Bench, source: torch.Tensor, facts: Facts) -> None:
        if source.dtype is torch.bfloat16:
            # numpy has no such dtype: the bits travel as integers.
            source = source.contiguous().view(torch.int16)
        device = bench.device
        wanted = source.clone()
        # From memory that may be written to: the device tensor is, and a wrong device may have kept the source's.
        there = device.upload(wanted.clone())
        copies = {
            "download: bits": (device.download(there), wanted),
            "download of a view: bits": (device.download(there.T), wanted.T.contiguous()),
        }
        # Issued later: must not be seen.
        device.copy_(there, _inverted(wanted))
        for name, (copy, expected) in copies.items():
            array = copy.wait()
            facts.same(name, torch.from_numpy(np.ascontiguousarray(array)), expected)
        array = copies["download: bits"][0].wait()
        array.fill(0)
        bench.synchronize()
        facts.same("download: the array is the caller's own", there, _inverted(wanted))

    def _cast(self, bench: Bench, source: torch.Tensor, facts: Facts) -> None:
        values = from_torch(source)
        for name, target in FORMATS.items():
            destination = bench.device.zeros(tuple(source.shape), target.torch)
            bench.device.copy_(destination, source)
            bench.synchronize()
            wanted = target.round(values)
            got = from_torch(destination)
            same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
            where = np.argwhere(~same)
            detail = ""
            if len(where):
                index = tuple(where[0])
                detail = f"{len(where)} wrong, {values[index]!r} became {got[index]!r}, not {wanted[index]!r}"
            facts.check(f"cast to {name}: nearest", not len(where), detail)

    # -- sources -------------------------------------------------------------------------------------------------------

    @property
    def _writable(self) -> bool:
        return self.case.structure["source"] not in ("mapped", "far", "far_rows", "expanded")

    @contextmanager
    def _source(self, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor | None, str]]:
        """A host tensor ``[rows, columns]`` in the case's kind of memory; None with the reason where there is none."""
        shape = (self.case.dim("rows"), self.case.dim("columns"))
        values = _pattern(self, "values", shape, dtype)
        kind = self.case.structure["source"]
        if kind in ("mapped", "far", "far_rows"):
            with _mapped(values, str(kind)) as tensor:
                yield tensor, ""
            return
        if kind == "pinned":
            try:
                pinned = values.pin_memory()
            except RuntimeError as error:
                yield None, f"no pinned memory: {str(error).splitlines()[0]}"
                return
            yield pinned, ""
            return
        yield _in_memory(values, str(kind)), ""


def _in_memory(values: torch.Tensor, kind: str) -> torch.Tensor:
    rows, columns = values.shape
    if kind == "offset":
        # One element behind an aligned address.
        buffer = torch.zeros(values.numel() + 1, dtype=values.dtype)
        buffer[1:] = values.reshape(-1)
        return buffer[1:].view(rows, columns)
    if kind == "strided":
        wide = torch.zeros(columns, 2 * rows, dtype=values.dtype)
        wide[:, ::2] = values.T
        return wide[:, ::2].T
    if kind == "expanded":
        return values[:1].expand(rows, columns)
    return values


@contextmanager
def _mapped(values: torch.Tensor, kind: str) -> Iterator[torch.Tensor]:
    """A read-only mapping of a file that holds ``values``; ``far``: behind a hole of more than 2 GiB; ``far_rows``:
    rows more than 2 GiB apart. Holes take no room on disk."""
    rows, columns = values.shape
    size = values.element_size()
    raw = values.contiguous().view(torch.uint8).reshape(rows, columns * size).numpy() if values.numel() else None
    lead = FAR if kind == "far" else 4096
    pitch = FAR if kind == "far_rows" else columns * size
    with tempfile.TemporaryFile() as file:
        file.truncate(lead + max(rows - 1, 0) * pitch + columns * size + 64)
        for row in range(rows if raw is not None else 0):
            file.seek(lead + row * pitch)
            assert raw is not None
            file.write(raw[row].tobytes())
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            # That it cannot be written to is the point.
            warnings.simplefilter("ignore")
            flat = torch.frombuffer(mapping, dtype=torch.uint8)
        # Only the elements between lead and the end are reached; the tensor keeps the mapping alive.
        count = (flat.numel() - lead) // size
        elements = flat[lead : lead + count * size].view(values.dtype)
        yield elements.as_strided((rows, columns), (pitch // size, 1), elements.storage_offset())


def _pattern(problem: DeviceProblem, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random bits; for ``data`` values, finite numbers without extremes."""
    count = shape[0] * shape[1]
    if problem.case.data == "values" and dtype.is_floating_point:
        form = FORMATS[str(dtype).removeprefix("torch.")]
        return to_torch(form.round(problem.source.normal(name, shape)), form.name)
    words = problem.source.words(name, count)
    if dtype is torch.bool:
        return torch.from_numpy((words & np.uint64(1)).astype(bool)).view(shape)
    integers = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    return torch.from_numpy(words.astype(integers)).view(dtype).view(shape)


def _is_on(values: torch.Tensor, wanted: torch.device) -> bool:
    """Whether ``values`` lie on ``wanted``; a device without a number is any of its type."""
    return values.device.type == wanted.type and wanted.index in (None, values.device.index)


def _inverted(values: torch.Tensor) -> torch.Tensor:
    """Other bits in every element."""
    if values.dtype is torch.bool:
        return ~values
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return (~values.contiguous().view(integers)).view(values.dtype)


def _stores(device: Device, dtype: torch.dtype) -> bool:
    try:
        device.zeros((1,), dtype)
    except Exception:
        return False
    return True


_PATHS: Mapping[str, Callable[[CopyProblem, Bench, torch.Tensor, Facts], None]] = {
    "upload": CopyProblem._upload,
    "copy": CopyProblem._copy,
    "copy_to_view": CopyProblem._copy_to_view,
    "on_device": CopyProblem._on_device,
    "download": CopyProblem._download,
    "cast": CopyProblem._cast,
}


class CopyPaths(DeviceCheck):
    """Every path from every kind of memory in every dtype that the contract stores."""

    operator = "device.copy_paths"
    levels = ("L0", "L1")

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": tuple(DTYPES),
            "structure.path": PATHS,
            "structure.source": SOURCES,
            "dims.rows": (3, 0, 1, 2, 17),
            "dims.columns": (5, 0, 1, 16, 67, 1024),
            "data": ("bits", "values"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.rows": (0, 24), "dims.columns": (0, 2048)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """Only floats are cast; an expanded source has a row; far rows are few."""
        if axes["structure.path"] == "cast" and axes["dtype"] not in FORMATS:
            axes = axes | {"dtype": "float32"}
        rows = axes["dims.rows"]
        assert isinstance(rows, int)
        if axes["structure.source"] == "expanded":
            rows = max(rows, 1)
        elif axes["structure.source"] == "far_rows":
            rows = min(rows, 3)
        return axes | {"dims.rows": rows}

    def problem(self, case: Case) -> Problem:
        return CopyProblem(case)
