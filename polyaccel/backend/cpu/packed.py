"""The two layouts that oneDNN packs a float matrix in: that of its inner product, and panels for a few rows at once."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch

# Rows that a packed layout is chosen for: a decode step's. Measured, see docs/cpu.md.
ROWS = 8
# The panels' width in columns. Eight rows of it fill 24 of a core's 32 vector registers and are multiplied in one pass
# over the weight; the inner product's 64 columns need two.
PANEL = 48
# Matrices of this many columns a row of k or more gain by panels; narrower ones do not, and lose a little at prefill.
WIDE = 4
# Up to this many rows oneDNN's choice of layout is the same one; more are multiplied in pieces,
FEW = 63
# of these sizes, largest first, where the choice for them is the same one too.
PIECES = (256, 128)
_ONCE = ([0, 0], [1, 1], [1, 1], 1)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of this dtype on this machine."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


class Packed(ABC):
    """A matrix ``[n, k]`` in an opaque layout, for good: made from a plain one and turned back into one."""

    _opaque: torch.Tensor

    @abstractmethod
    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ W.T + bias`` for contiguous ``x: [T, k]``; returns a new contiguous ``[T, n]``."""

    @abstractmethod
    def multiply_add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias + residual``, rounded once; ``residual: [T, n]`` is contiguous and left as it is; T > 0."""

    @abstractmethod
    def plain(self) -> torch.Tensor:
        """A new ``[n, k]`` of the same values, bit for bit."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(torch.ops.mkldnn._nbytes(self._opaque))


class InnerProduct(Packed):
    """The layout of oneDNN's inner product, which serves every number of rows."""

    def __init__(self, plain: torch.Tensor) -> None:
        self._opaque = torch.ops.mkldnn._reorder_linear_weight(plain, ROWS)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._opaque, bias, "none", [], "")
        return y

    def multiply_add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._opaque, bias, "add")
        return y

    def plain(self) -> torch.Tensor:
        return self._opaque.to_dense()


class Panels(Packed):
    """The layout of oneDNN's 1x1 convolution: panels of 48 columns, the rows being the pixels of one image.

    oneDNN chooses a layout by the number of rows, and silently reorders the weight in every call whose choice differs:
    correct, and several times slower. :func:`sizes` compares the choices, so that no such call is made.

    ``sizes``: the numbers of rows to multiply at once, largest first; the last stands for fewer as well.
    """

    def __init__(self, plain: torch.Tensor, sizes: Sequence[int]) -> None:
        self._n, self._k = plain.shape
        self._sizes = tuple(sizes)
        self._opaque = _panels(plain, ROWS)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._product(x, bias, None)

    def multiply_add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        return self._product(x, bias, residual)

    def plain(self) -> torch.Tensor:
        return self._opaque.to_dense().reshape(self._n, self._k)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] <= FEW:
            return self._once(x, bias, residual)
        y = x.new_empty(x.shape[0], self._n)
        for start, stop in cuts(x.shape[0], self._sizes):
            added = None if residual is None else residual[start:stop]
            y[start:stop].copy_(self._once(x[start:stop], bias, added))
        return y

    def _once(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
        t, n = x.shape[0], self._n
        if not t:
            return x.new_empty(0, n)
        convolution, image = torch.ops.mkldnn._convolution_pointwise, _image(x)
        if residual is None:
            y = convolution.default(image, self._opaque, bias, *_ONCE, "none", [], "")
        else:
            added = _image(residual)
            y = convolution.binary(image, added, self._opaque, bias, *_ONCE, "add", None, None, [], None)
        rows: torch.Tensor = y.as_strided((t, n), (n, 1))
        return rows


def pack(plain: torch.Tensor) -> Packed:
    """The layout in which a decode step multiplies ``plain: [n, k]`` fastest; the values are copied."""
    n, k = plain.shape
    fitting = sizes(n, k, torch.get_num_threads()) if plain.dtype == torch.float32 and n >= WIDE * k else ()
    return Panels(plain, fitting) if fitting else InnerProduct(plain)


@cache
def sizes(n: int, k: int, threads: int) -> tuple[int, ...]:
    """How many rows at once oneDNN multiplies by an ``[n, k]`` in panels, largest first; none: in another layout.

    Found out from oneDNN itself, by packing one matrix for several numbers of rows: the choice depends on the
    machine's instructions, the shape and the number of threads, and cannot be asked for.
    """
    if n % PANEL or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return ()
    probe = torch.arange(n * k, dtype=torch.float32).remainder_(8191).view(n, k)
    # The first panel tells layouts apart; comparing more would only take time at load.
    panel = probe[:PANEL].t().contiguous()
    if not all(_begins(_panels(probe, rows), panel) for rows in (1, ROWS, FEW)):
        return ()
    return (*(rows for rows in PIECES if _begins(_panels(probe, rows), panel)), FEW)


def cuts(rows: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where to cut ``rows``: pieces of the larger sizes, then parts of at most the last and of much the same size."""
    found, start = [], 0
    for size in sizes[:-1]:
        while rows - start >= size:
            found.append((start, start + size))
            start += size
    left = rows - start
    parts = -(-left // sizes[-1])
    ends = [start + left * i // parts for i in range(parts + 1)] if parts else []
    return found + list(pairwise(ends))


def _image(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous ``rows: [T, k]`` as one image of T pixels and k channels, channels last."""
    t, k = rows.shape
    return rows.as_strided((1, k, t, 1), (t * k, 1, k, k))


def _panels(plain: torch.Tensor, rows: int) -> torch.Tensor:
    n, k = plain.shape
    packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(plain.view(n, k, 1, 1), *_ONCE, [1, k, rows, 1])
    return packed


def _begins(opaque: torch.Tensor, panel: torch.Tensor) -> bool:
    held = ctypes.string_at(torch.ops.mkldnn.data_ptr(opaque), panel.nbytes)
    return held == ctypes.string_at(panel.data_ptr(), panel.nbytes)
