"""A request's adapter argument: none, a name, or several names with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from polyaccel.backend.errors import RequestRejected

MAX_ENTRIES = 8

AdapterArgument = str | Mapping[str, float] | Sequence[tuple[str, float]] | None
AdapterMix = tuple[tuple[str, float], ...]


def normalise_mix(adapter: AdapterArgument) -> AdapterMix:
    """Ordered ``(name, weight)`` entries of a request's adapter argument; empty for the base model.

    Entries are ordered by name: equal mixes are then equal keys and add their deltas in the same order. A name alone
    has weight 1.0. A weight of 0.0 is kept.

    Raises:
        RequestRejected: another type, an empty name, a name twice, more than 8 entries, a weight that is not finite.
    """
    if adapter is None:
        return ()
    if isinstance(adapter, str):
        pairs: list[tuple[object, object]] = [(adapter, 1.0)]
    elif isinstance(adapter, Mapping):
        pairs = list(adapter.items())
    else:
        pairs = _listed(adapter)
    if len(pairs) > MAX_ENTRIES:
        raise RequestRejected(f"adapter names {len(pairs)} adapters; at most {MAX_ENTRIES} can be mixed in one request")
    mix: dict[str, float] = {}
    for name, weight in pairs:
        if not isinstance(name, str) or not name:
            raise RequestRejected(f"an adapter name must be a non-empty string, not {name!r}")
        if name in mix:
            raise RequestRejected(f"adapter {name!r} is named twice in one request; add its weights")
        mix[name] = _weight(name, weight)
    return tuple(sorted(mix.items()))


def _listed(adapter: object) -> list[tuple[object, object]]:
    if isinstance(adapter, Sequence) and not isinstance(adapter, (str, bytes)):
        pairs = [tuple(pair) for pair in adapter if isinstance(pair, (tuple, list)) and len(pair) == 2]
        if len(pairs) == len(adapter):
            return [(name, weight) for name, weight in pairs]
    raise RequestRejected(f"adapter must be a name or a mapping of names to weights, not {adapter!r:.200}")


def _weight(name: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise RequestRejected(f"the weight of adapter {name!r} must be a number, not {weight!r}")
    try:
        value = float(weight)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise RequestRejected(f"the weight of adapter {name!r} must be finite, not {weight!r}")
    return value
