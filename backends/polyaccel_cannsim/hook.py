"""Installs the simulator when torch_npu is first imported, whoever imports it: torch's autoload or a program."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def arm() -> None:
    """From now on the first ``import torch_npu`` of this process finds simulated cards."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch_npu":
            return None
        # To ask whether torch_npu is there imports nothing, so this finder stays for the import that may follow.
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(place, self)
        if spec is None or spec.loader is None:
            return spec
        from .process import installed

        if not installed():
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """torch_npu's own loader between loading the simulated libraries and what needs torch_npu."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from . import process

        process.prepare()
        self._inner.exec_module(module)
        process.finish()
