"""From a checkpoint's tensors to a rank's weights: what is read, where it goes, all checks before the first read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from polyaccel.backend.errors import ModelLoadError
from polyaccel.backend.weight import Weight
from polyaccel.parallel.cut import Rows
from polyaccel.weights.checkpoint import Checkpoint

Progress = Callable[[int, int], None]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Bounds the dequantised copy of a piece of a large quantised tensor, and gives progress a fine grain.
CHUNK_ELEMENTS = 1 << 23
# Buffers that older exports saved and that every reader computes anew.
HARMLESS_SUFFIXES = ("rotary_emb.inv_freq",)
_SHOWN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The part of one checkpoint tensor that goes to one slice of one site on this rank.

    ``shape`` is the whole tensor's; ``rows`` and ``cols`` are what this rank holds of the matrix ``[n, k]`` (of a bias
    ``[n]``: its rows). They go to the first rows and columns of the slice; the rest of it is padding and becomes zero.
    ``stacked`` is the matrix's index in a tensor ``[experts, n, k]``.
    """

    name: str
    shape: tuple[int, ...]
    site: str
    slice: int = 0
    rows: Rows
    cols: Rows = field(default_factory=Rows)
    expert: int | None = None
    stacked: int | None = None

    @property
    def is_bias(self) -> bool:
        return len(self.shape) == 1

    @property
    def elements(self) -> int:
        """Elements that this rank reads."""
        return self.rows.size * (1 if self.is_bias else self.cols.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSource:
    """A small tensor that every rank holds whole, such as a norm's weight: ``[size]``."""

    name: str
    size: int


def check(
    checkpoint: Checkpoint,
    sources: Sequence[Source],
    vectors: Sequence[VectorSource],
    harmless: Collection[str] | None = None,
) -> None:
    """Compare the checkpoint's tensors with the model's before anything is read.

    Tensors that the model does not know are refused too, except ``harmless`` ones; with None they are not looked for.

    Raises:
        ModelLoadError: tensors that are missing, unknown, of another shape or of no float dtype; all are named.
    """
    wanted: dict[str, tuple[int, ...]] = {source.name: source.shape for source in sources}
    wanted |= {vector.name: (vector.size,) for vector in vectors}
    names = checkpoint.names()
    present = set(names)
    problems: list[str] = []
    missing = [name for name in wanted if name not in present]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_shorten(missing)}")
    if harmless is not None:
        known = wanted.keys() | set(harmless)
        unknown = [name for name in names if name not in known and not name.endswith(HARMLESS_SUFFIXES)]
        if unknown:
            problems.append(f"{len(unknown)} tensors have no place in this model: {_shorten(unknown)}")
    wrong: list[str] = []
    for name, shape in wanted.items():
        if name not in present:
            continue
        if tuple(checkpoint.shape(name)) != shape:
            wrong.append(f"{name} has shape {list(checkpoint.shape(name))}, the configuration wants {list(shape)}")
        if checkpoint.dtype(name) not in FLOATS:
            wrong.append(f"{name} has dtype {checkpoint.dtype(name)}, wanted is a float dtype of 16 bits or more")
    if wrong:
        problems.append(f"{len(wrong)} tensors do not fit: {_shorten(wrong)}")
    if problems:
        text = "; ".join(problems)
        raise ModelLoadError(
            f"the checkpoint does not hold this model: {text}; download it again or correct config.json"
        )


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class Meter:
    """Adds up the bytes read and tells the callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self._progress = progress

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self._progress is not None and nbytes:
            self._progress(self.done, self.total)


def share(checkpoint: Checkpoint, source: Source | VectorSource) -> int:
    """Bytes of the file that this source stands for."""
    nbytes = checkpoint.nbytes(source.name)
    if isinstance(source, VectorSource):
        return nbytes
    whole = 1
    for extent in source.shape:
        whole *= extent
    return nbytes * source.elements // whole if whole else 0


def write(checkpoint: Checkpoint, weight: Weight, sources: Sequence[Source], meter: Meter) -> None:
    """Write all of one weight, padding included, and seal it. The weight is open.

    Raises:
        ModelLoadError: from reading.
        OutOfMemory: from packing.
    """
    for source in sources:
        if source.is_bias:
            _write_bias(checkpoint, weight, source, meter)
        else:
            _write_matrix(checkpoint, weight, source, meter)
    weight.seal()


def _write_bias(checkpoint: Checkpoint, weight: Weight, source: Source, meter: Meter) -> None:
    if not weight.spec.bias:
        return
    width = weight.spec.slices[source.slice].n
    row = 0
    for start, stop in source.rows:
        part = checkpoint.read(source.name, rows=slice(start, stop))
        weight.write_bias(source.slice, part, row=row, expert=source.expert)
        row += stop - start
    if row < width:
        weight.write_bias(source.slice, torch.zeros(width - row), row=row, expert=source.expert)
    meter.add(share(checkpoint, source))


def _write_matrix(checkpoint: Checkpoint, weight: Weight, source: Source, meter: Meter) -> None:
    total, written, reported = share(checkpoint, source), 0, 0
    row = 0
    for start, stop in _row_chunks(source) if source.elements else ():
        col = 0
        for left, right in source.cols:
            part = _read(checkpoint, source, (start, stop), (left, right))
            weight.write(source.slice, part, row=row, col=col, expert=source.expert)
            col += right - left
            written += part.numel()
        row += stop - start
        now = total * written // source.elements
        meter.add(now - reported)
        reported = now
    _zero_padding(weight, source)


def _zero_padding(weight: Weight, source: Source) -> None:
    rows, cols = source.rows.size, source.cols.size
    width, k = weight.spec.slices[source.slice].n, weight.spec.k
    for row, col, height, length in ((rows, 0, width - rows, k), (0, cols, rows, k - cols)):
        step = max(1, CHUNK_ELEMENTS // max(1, length))
        for top in range(0, height if length else 0, step):
            zeros = torch.zeros(min(step, height - top), length)
            weight.write(source.slice, zeros, row=row + top, col=col, expert=source.expert)


def _row_chunks(source: Source) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_ELEMENTS // max(1, source.cols.size))
    for start, stop in source.rows:
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


def _read(checkpoint: Checkpoint, source: Source, rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
    if source.stacked is None:
        return checkpoint.read(source.name, rows=slice(*rows), cols=slice(*cols))
    matrix = slice(source.stacked, source.stacked + 1)
    return checkpoint.read(source.name, rows=matrix, cols=slice(*rows))[0, :, cols[0] : cols[1]]


def by_site(sources: Sequence[Source]) -> Mapping[str, list[Source]]:
    """The sources of each site, in the order in which sites first appear."""
    grouped: dict[str, list[Source]] = {}
    for source in sources:
        grouped.setdefault(source.site, []).append(source)
    return grouped
