"""The operators between ranks: calls of the communicator, which launches and counts them itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from polyaccel.backend.composite import operators

COLLECTIVES: Mapping[str, Callable[..., object]] = MappingProxyType(
    {
        "all_reduce": operators.all_reduce,
        "all_gather": operators.all_gather,
        "reduce_scatter": operators.reduce_scatter,
        "all_to_all": operators.all_to_all,
        "broadcast": operators.broadcast,
        "barrier": operators.barrier,
    }
)
