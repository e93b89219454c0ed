"""One case: everything that decides what is computed, and nothing else.

A case is a value. It says what to draw, not what was drawn: data come from its seed through generators that give the
same bits on every platform, so that a case file of a few hundred bytes is a full reproduction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

Scalar = int | float | str | bool | None
Choice = Scalar | tuple[int, ...]
"""What an axis may hold. Tuples are structures of small integers, such as segment lengths."""

SECTIONS = ("dims", "attributes", "layouts", "structure")


def _empty() -> Mapping[str, Choice]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One case of one operator or station.

    Attributes:
        operator: name in the contract.
        dtype: of activations, ``float32``, ``float16`` or ``bfloat16``.
        dims: exact sizes, such as ``tokens``, ``k``, ``n``.
        attributes: the operator's attribute arguments.
        layouts: layout of each tensor argument by its name in the contract (:mod:`harness.layouts`).
        structure: what is neither a size nor an attribute: segments, histograms, block order, ranks of adapters.
        alias: ``"none"`` or ``"argument=argument"``, the same view passed twice.
        device: ``"current"``, or ``"other"``: another device is current while the call is made.
        stream: ``"default"`` or ``"side"``.
        data: kind of data, which decides the tier (:mod:`data.kinds`).
        ranks: world size; ``skew``: per-rank delay in milliseconds, empty for none.
        seed: of all data.
    """

    operator: str
    dtype: str = "float32"
    dims: Mapping[str, Choice] = field(default_factory=_empty)
    attributes: Mapping[str, Choice] = field(default_factory=_empty)
    layouts: Mapping[str, Choice] = field(default_factory=_empty)
    structure: Mapping[str, Choice] = field(default_factory=_empty)
    alias: str = "none"
    device: str = "current"
    stream: str = "default"
    data: str = "normal"
    ranks: int = 1
    skew: tuple[int, ...] = ()
    seed: int = 0
    _key: str = field(default="", init=False, repr=False, compare=False)

    @classmethod
    def of(cls, operator: str, axes: Mapping[str, Choice], seed: int = 0) -> Case:
        """From axes named by path: ``{"dims.tokens": 3, "layouts.x": "transposed", "data": "normal"}``.

        Raises:
            KeyError: an axis that a case does not have.
        """
        sections: dict[str, dict[str, Choice]] = {name: {} for name in SECTIONS}
        plain: dict[str, Choice] = {}
        for path, value in axes.items():
            section, dot, name = path.partition(".")
            if dot and section in sections:
                sections[section][name] = value
            elif not dot and path in _PLAIN:
                plain[path] = value
            else:
                raise KeyError(f"a case has no axis {path!r}")
        frozen = {name: MappingProxyType(values) for name, values in sections.items()}
        return cls(operator=operator, seed=seed, **frozen, **plain)  # type: ignore[arg-type]

    def axes(self) -> dict[str, Choice]:
        """The inverse of :meth:`of`, seed excluded, in a fixed order."""
        found: dict[str, Choice] = {name: getattr(self, name) for name in _PLAIN}
        for section in SECTIONS:
            values: Mapping[str, Choice] = getattr(self, section)
            found |= {f"{section}.{name}": values[name] for name in sorted(values)}
        return found

    def dim(self, name: str) -> int:
        """A size; KeyError if the case has none of this name."""
        value = self.dims[name]
        assert isinstance(value, int)
        return value

    def layout(self, argument: str) -> str:
        return str(self.layouts.get(argument, "contiguous"))

    def with_(self, **changes: Choice) -> Case:
        """A copy with axes changed, dots written as double underscores: ``case.with_(dims__k=3)``."""
        axes = self.axes() | {name.replace("__", "."): value for name, value in changes.items() if name != "seed"}
        seed = changes.get("seed", self.seed)
        assert isinstance(seed, int)
        return Case.of(self.operator, axes, seed)

    def with_seed(self, seed: int) -> Case:
        return replace(self, seed=seed)

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, object]:
        axes = {path: list(v) if isinstance(v, tuple) else v for path, v in self.axes().items()}
        return {"operator": self.operator, "seed": self.seed, "axes": axes}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Case:
        """Raises ValueError for anything that :meth:`to_json` does not write."""
        operator, seed, axes = value.get("operator"), value.get("seed"), value.get("axes")
        if not (isinstance(operator, str) and isinstance(seed, int) and isinstance(axes, Mapping)):
            raise ValueError("a case has an operator (string), a seed (integer) and axes (object)")
        found: dict[str, Choice] = {}
        for path, item in axes.items():
            if isinstance(item, list) and all(isinstance(i, int) for i in item):
                found[str(path)] = tuple(item)
            elif item is None or isinstance(item, int | float | str | bool):
                found[str(path)] = item
            else:
                raise ValueError(f"axis {path!r} holds {item!r}")
        try:
            return cls.of(operator, found, seed)
        except KeyError as error:
            raise ValueError(str(error.args[0])) from error

    def __reduce__(self) -> tuple[object, ...]:
        # Read-only mappings cannot be pickled; cases travel to worker processes.
        return _restore, (self.to_json(),)

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that name this case."""
        if not self._key:
            # Several checks ask for it, to choose cases by it.
            text = json.dumps(self.to_json(), sort_keys=True)
            object.__setattr__(self, "_key", hashlib.sha256(text.encode()).hexdigest()[:16])
        return self._key


def _restore(value: dict[str, object]) -> Case:
    return Case.from_json(value)


_PLAIN = ("dtype", "alias", "device", "stream", "data", "ranks", "skew")
