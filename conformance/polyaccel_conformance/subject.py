"""What is being tested: a backend by name, or a table of callables."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyaccel.backend import OPERATORS, Backend, TableBackend, load
from polyaccel.backend.backend import Implementations
from polyaccel_conformance.errors import UsageError

Kind = Literal["backend", "table"]

ALL = "*"
BATCH_INVARIANT = "batch_invariant"
SIMULATED = "simulated"
"""The backend that comes with the suite and has no entry point."""


class OperatorTable(TableBackend):
    """A mapping that the user named: operators that it does not hold are out of scope."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """How a worker gets the backend under test. A value of strings only, so that it can be sent to any process.

    Attributes:
        kind: ``backend``: an installed backend by ``name``; ``table``: attribute ``name`` of the Python file ``path``,
            a mapping of operators or a Backend.
        device: for a table, the torch device.
        mutant: name of the planted bug to apply to it, empty for none.
        native: operators that are left to it beside the mandatory ones, with commas between; :data:`ALL` for all. The
            others run as composites.
        promise: ``batch_invariant`` to have it promise that, empty for what it promises by itself.
    """

    kind: Kind = "backend"
    name: str = "cpu"
    path: str = ""
    device: str = "cpu"
    mutant: str = ""
    native: str = ALL
    promise: str = ""

    def open(self) -> Backend:
        """A new instance.

        Raises:
            UsageError: the file or attribute is not there, or is no table.
            BackendUnavailable: the backend cannot be used here, with the reason.
            ConfigurationError: it cannot make the promise.
        """
        backend = self._named() if self.kind == "backend" else self._table()
        if self.mutant:
            from polyaccel_conformance.mutants.catalogue import apply_mutant

            backend = apply_mutant(self.mutant, backend)
        if self.native != ALL:
            limit(backend, tuple(filter(None, self.native.split(","))))
        if self.promise == BATCH_INVARIANT:
            backend.require_batch_invariance()
        return backend

    @property
    def by_name(self) -> bool:
        """Whether another process that knows only the backend's name gets this subject: it is installed, and nothing of
        the backend itself is planted."""
        if self.kind != "backend" or self.name == SIMULATED:
            return False
        if not self.mutant:
            return True
        from polyaccel_conformance.mutants.catalogue import found

        return found(self.mutant).engine

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"backend {self.name!r}" if self.kind == "backend" else f"{self.path}:{self.name}"

    def _named(self) -> Backend:
        if self.name == SIMULATED:
            from polyaccel_conformance.simulated import SimulatedBackend

            return SimulatedBackend()
        return load(self.name)

    def _table(self) -> Backend:
        value = load_attribute(Path(self.path), self.name)
        if isinstance(value, Backend):
            return value
        if callable(value):
            value = value()
            if isinstance(value, Backend):
                return value
        if not isinstance(value, Mapping):
            raise UsageError(f"{self.path}:{self.name} is a {type(value).__name__}, expected a mapping or a Backend")
        return OperatorTable(self.device, value, name=self.name.lower())

    def to_json(self) -> dict[str, str]:
        found: dict[str, str] = {name: getattr(self, name) for name in ("kind", "name", "path", "device", "mutant")}
        further = {"native": (self.native, ALL), "promise": (self.promise, "")}
        return found | {name: value for name, (value, usual) in further.items() if value != usual}

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> Subject:
        """Raises ValueError for anything that :meth:`to_json` does not write."""
        kind = value["kind"]
        if kind not in ("backend", "table"):
            raise ValueError(f"a subject is a backend or a table, not {kind!r}")
        return cls(
            kind="backend" if kind == "backend" else "table",
            **{name: value[name] for name in ("name", "path", "device", "mutant")},
            native=value.get("native", ALL),
            promise=value.get("promise", ""),
        )


def limit(backend: Backend, native: Sequence[str]) -> None:
    """Take from this instance every operator that is neither ``native`` nor mandatory."""
    everything = backend.operators()
    kept: Mapping[str, Implementations] = {
        name: value
        for name, value in everything.items()
        if name in native or (name in OPERATORS and OPERATORS[name].mandatory)
    }
    # The instance's own attribute hides the method; nothing else of the backend changes.
    object.__setattr__(backend, "operators", lambda: kept)


def load_attribute(path: Path, name: str) -> object:
    """An attribute of a Python file that the user names on the command line; the file is run.

    Raises:
        UsageError: no such file or attribute.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} raised {type(error).__name__} when it was run: {error}") from error
    if not hasattr(module, name):
        raise UsageError(f"{path} has no {name!r}")
    value: object = getattr(module, name)
    return value
