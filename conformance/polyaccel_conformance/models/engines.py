"""Engines on the subject and on the reference, over the same small models."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from polyaccel import LLM
from polyaccel.backend import Backend, TableBackend
from polyaccel_conformance.models.answers import Answer, Mix, ask_alone, greedy
from polyaccel_conformance.models.families import ADAPTERS, FAMILIES, prompts, write_adapter, write_model
from polyaccel_conformance.models.kept import Kept
from polyaccel_conformance.models.reference import Reference, Request
from polyaccel_conformance.models.rounding import Rounding, rounding

LENGTHS = (5, 37, 1, 70, 18, 45)
GREEDY = greedy(12)
KV_BYTES = 32 << 20


class Workshop:
    """Folders of models and adapters, made when first asked for, and the reference's answers to them.

    Used as a context manager: the files are gone at its end.

    Args:
        kept: a folder of what the reference says, shared with other processes that ask the same.
    """

    def __init__(self, kept: Path | None = None) -> None:
        self._kept = Kept(kept)
        self._folder = tempfile.TemporaryDirectory(prefix="polyaccel-conformance-")
        self._answers: dict[tuple[str, tuple[str, ...], int], list[Answer]] = {}
        self._rounding: dict[tuple[str, tuple[str, ...]], Rounding] = {}

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    @cached_property
    def _root(self) -> Path:
        return Path(self._folder.name)

    def model(self, family: str) -> Path:
        folder = self._root / family
        return folder if folder.exists() else write_model(FAMILIES[family], folder)

    def adapters(self, family: str) -> dict[str, Path]:
        made: dict[str, Path] = {}
        for name, adapter in ADAPTERS.items():
            folder = self._root / f"{family}-{name}"
            made[name] = folder if folder.exists() else write_adapter(adapter, FAMILIES[family], folder)
        return made

    def prompts(self, family: str, block_size: int = 0) -> list[list[int]]:
        """Six prompts; with a ``block_size``, such that most of them have full blocks, the second and last the same."""
        lengths = LENGTHS
        if block_size:
            lengths = (block_size + 5, 2 * block_size + 3, 1, block_size, 18, 2 * block_size + 9)
        return prompts(FAMILIES[family], lengths)

    def open(self, family: str, backend: Backend | str, **options: Any) -> LLM:
        """An engine, small; options of :class:`polyaccel.LLM` on top."""
        settings: dict[str, Any] = {
            "dtype": "float32",
            "max_num_seqs": 8,
            "max_batched_tokens": 64,
            "kv_cache_bytes": KV_BYTES,
            "policy": "allow",
            "threads": 1,
            "timeout": 60.0,
            "adapter_slots": 4,
            "adapter_rank_rows": 64,
            "graphs": False,
        }
        return LLM(self.model(family), backend=backend, **(settings | options))

    def rounding(self, family: str, mixes: Sequence[Mix]) -> Rounding:
        """The exact log-probabilities of the prompts with the reference's answers, and what rounding may change."""
        key = (family, tuple(str(m) for m in mixes))
        if key not in self._rounding:
            self._rounding[key] = self._kept.rounding(key, lambda: self._compute_rounding(family, mixes))
        return self._rounding[key]

    def _compute_rounding(self, family: str, mixes: Sequence[Mix]) -> Rounding:
        answers, slots = self.reference(family, mixes), {name: slot for slot, name in enumerate(ADAPTERS)}
        requests = [
            Request(ids=np.array([*prompt, *answer.tokens]), queries=1, mix=_by_slot(mix, slots))
            for prompt, answer, mix in zip(self.prompts(family), answers, mixes, strict=True)
        ]
        return rounding(Reference(FAMILIES[family], dict(enumerate(ADAPTERS.values()))), requests)

    def reference(self, family: str, mixes: Sequence[Mix], block_size: int = 0) -> list[Answer]:
        """Answers of the composites on the CPU: one prompt at a time, nothing overlapped, cached or captured."""
        key = (family, tuple(str(m) for m in mixes), block_size)
        if key not in self._answers:
            self._answers[key] = self._kept.answers(key, lambda: self._ask_reference(family, mixes, block_size))
        return self._answers[key]

    def _ask_reference(self, family: str, mixes: Sequence[Mix], block_size: int) -> list[Answer]:
        plain = {"overlap": False, "prefix_caching": False, "max_batched_tokens": 512}
        used = any(m is not None for m in mixes)
        backend = TableBackend("cpu", {})
        with self.open(family, backend, adapters=self.adapters(family) if used else None, **plain) as llm:
            return ask_alone(llm, self.prompts(family, block_size), mixes, [GREEDY] * len(mixes))


def _by_slot(mix: Mix, slots: Mapping[str, int]) -> dict[int, float]:
    named = {} if mix is None else {mix: 1.0} if isinstance(mix, str) else mix
    return {slots[name]: weight for name, weight in named.items()}
