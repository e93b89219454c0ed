"""Floating-point formats, and rounding to them from float64 in one correct step."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]


_FLOAT64_BITS = 53


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A binary format with ``bits`` bits of significand (the hidden one included) and smallest exponent ``emin``."""

    name: str
    torch: torch.dtype
    bits: int
    emin: int
    max: float

    @property
    def unit(self) -> float:
        """Unit roundoff: the largest relative error of rounding to nearest."""
        return 2.0**-self.bits

    @property
    def smallest(self) -> float:
        """The smallest positive (subnormal) number."""
        return 2.0 ** (self.emin - self.bits + 1)

    @property
    def overflow(self) -> float:
        """From this magnitude on, rounding to nearest even gives infinity."""
        return self.max + 0.5 * float(self.quantum(np.float64(self.max)))

    def quantum(self, x: npt.ArrayLike) -> Floats:
        """Distance of neighbouring numbers around ``x``."""
        x = np.asarray(x, dtype=np.float64)
        _, exponent = np.frexp(np.where(np.isfinite(x), x, 0.0))
        quantum: Floats = np.ldexp(1.0, np.maximum(exponent - 1, self.emin) - self.bits + 1)
        return quantum

    def round(self, x: npt.ArrayLike) -> Floats:
        """To nearest, ties to even; overflow gives infinity, subnormals are kept."""
        x = np.asarray(x, dtype=np.float64)
        if self.torch is torch.float32:
            with np.errstate(invalid="ignore", over="ignore", under="ignore"):
                return x.astype(np.float32).astype(np.float64)
        # By a carry into the bits that stay, which takes a fraction of the time that quanta take.
        dropped = _FLOAT64_BITS - self.bits
        bits = x.view(np.uint64)
        size = np.abs(x)
        with np.errstate(invalid="ignore", over="ignore"):
            carried = bits + ((bits >> np.uint64(dropped)) & np.uint64(1)) + np.uint64((1 << (dropped - 1)) - 1)
            rounded = np.asarray(carried & ~np.uint64((1 << dropped) - 1)).view(np.float64)
            if (size < 2.0**self.emin).any():
                rounded = np.where(size < 2.0**self.emin, np.rint(x / self.smallest) * self.smallest, rounded)
            if not (size <= self.max).all():
                rounded = np.where(np.abs(rounded) > self.max, np.copysign(np.inf, x), rounded)
                rounded = np.where(np.isfinite(x), rounded, x)
        return rounded

    def truncate(self, x: npt.ArrayLike) -> Floats:
        """Toward zero: what some accumulators do."""
        x = np.asarray(x, dtype=np.float64)
        quantum = self.quantum(x)
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(x), np.trunc(x / quantum) * quantum, x)


def _format(name: str, dtype: torch.dtype, bits: int, emin: int) -> Format:
    return Format(name=name, torch=dtype, bits=bits, emin=emin, max=float(torch.finfo(dtype).max))


FORMATS: MappingProxyType[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            _format("float32", torch.float32, 24, -126),
            _format("float16", torch.float16, 11, -14),
            _format("bfloat16", torch.bfloat16, 8, -126),
        )
    }
)

INTEGERS: MappingProxyType[str, torch.dtype] = MappingProxyType(
    {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}
)


_BITS: MappingProxyType[int, torch.dtype] = MappingProxyType(
    {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
)


def format_of(dtype: str | torch.dtype) -> Format:
    """By the contract's name or torch's dtype."""
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    return FORMATS[name]


def to_torch(values: npt.NDArray[np.generic], dtype: str) -> torch.Tensor:
    """A contiguous host tensor with exactly these values; they must be representable."""
    if dtype in INTEGERS:
        return torch.from_numpy(np.ascontiguousarray(values)).to(INTEGERS[dtype])
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    # float64 to bfloat16 passes float32 in torch; that is exact here because the values are representable.
    return tensor.to(torch.float32).to(FORMATS[dtype].torch)


def from_torch(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Float64 (exact) or int64 values on the host."""
    host = tensor.detach().to("cpu")
    if host.dtype.is_floating_point:
        return host.to(torch.float32).to(torch.float64).numpy() if host.dtype != torch.float64 else host.numpy()
    return host.to(torch.int64).numpy()


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The bit patterns as integers, for bitwise comparison and hashes; NaN payloads included."""
    host = tensor.detach().to("cpu").contiguous()
    if host.dtype is torch.bool:
        host = host.to(torch.uint8)
    return host.view(_BITS[host.element_size()]).numpy()
