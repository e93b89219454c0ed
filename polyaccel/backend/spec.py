"""The form in which an operator is specified. The operators themselves are in ``vocabulary`` and ``stations``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Literal

import torch

ArgumentKind = Literal["tensor", "weight", "step", "kv", "communicator", "sampling", "rope", "attribute"]

FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
"""Activation dtypes an operator may be asked for."""


class NonFinite(Enum):
    """What an infinity or NaN in an operand does."""

    PROPAGATES = "propagates by IEEE arithmetic to every output it contributes to"
    MASKED = "does not reach the output where the element is masked"
    NEVER_READ = "elements outside the described range are never read"
    SEGMENT = "may reach every output of its own sequence or segment, also where it is masked; no other"


class Layout(Enum):
    """Layouts of a tensor argument that an implementation must accept; the core copies (and counts) anything else."""

    CONTIGUOUS = "contiguous"
    ROWS = "last dimension dense, any row stride"
    STRIDED = "any strides, expanded dimensions included"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of an operator.

    ``shape`` uses names of dimensions; ``may_alias`` lists arguments whose memory may be the same (exactly the same
    view).
    """

    name: str
    kind: ArgumentKind = "tensor"
    shape: str = ""
    dtypes: tuple[torch.dtype, ...] = ()
    layouts: tuple[Layout, ...] = (Layout.ROWS,)
    mutated: bool = False
    optional: bool = False
    may_alias: tuple[str, ...] = ()
    non_finite: NonFinite = NonFinite.PROPAGATES
    values: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """The coarsest arithmetic that is still right. Tolerances are derived from this, never from a backend's
    declaration.

    Attributes:
        accumulator: dtype in which sums of products are kept at least.
        intermediates: permitted formats of named intermediate results; ``"x"`` stands for the dtype of ``x``.
        output_roundings: roundings (to nearest even) between accumulator and output.
        ulps: allowance of transcendental parts, in units in the last place of float32.
        exact: the result is defined bit for bit.
    """

    accumulator: torch.dtype = torch.float32
    intermediates: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    output_roundings: int = 1
    ulps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    exact: bool = False


EXACT = Numerics(output_roundings=0, exact=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSpec:
    """One operator or station of the contract.

    Attributes:
        name: the field's term for it.
        since: contract version that introduced it.
        critical: whether policy ``strict`` refuses to run it as a composite.
        mandatory: whether every backend must implement it.
        semantics: what it computes, with shapes.
        returns: shapes and dtypes of the result.
        parts: for a station, the operators it expands into (in order of use); empty for an operator.
    """

    name: str
    group: str
    semantics: str
    arguments: tuple[Argument, ...]
    returns: str
    numerics: Numerics = Numerics()
    since: tuple[int, int] = (1, 0)
    critical: bool = False
    mandatory: bool = False
    parts: tuple[str, ...] = ()

    @property
    def is_station(self) -> bool:
        return bool(self.parts)

    def argument(self, name: str) -> Argument:
        for argument in self.arguments:
            if argument.name == name:
                return argument
        raise KeyError(f"operator {self.name!r} has no argument {name!r}")
