"""``cache.identity``: the same path or name with other content never gives the old answer (F3).

Caches that an engine has: adapters in slots, the KV of prompts' beginnings by load generation and mix weights, and
whatever a backend derives from weights. Each case asks a small engine on the device under test, changes what the answer
depends on, asks again, and compares with an engine that has never seen the former content.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.device_check import DeviceCheck, DeviceProblem, Facts
from polyaccel_conformance.oracle.primitives import ACCUMULATOR
from polyaccel_conformance.problem import Problem

if TYPE_CHECKING:
    from polyaccel import LLM
    from polyaccel_conformance.models.answers import Answer, Mix
    from polyaccel_conformance.models.families import Family

TOKENS = 8
PROMPT = 150
Drive = Callable[["IdentityProblem", Bench, Facts, Path], None]


class IdentityProblem(DeviceProblem):
    """One way in which content changes under a name."""

    _noise = 0.0

    def drive(self, bench: Bench, facts: Facts) -> None:
        with tempfile.TemporaryDirectory(prefix="polyaccel-conformance-") as folder:
            _CHANGES[str(self.case.structure["change"])](self, bench, facts, Path(folder))

    # -- changes -------------------------------------------------------------------------------------------------------

    def _reloaded(self, bench: Bench, facts: Facts, root: Path) -> None:
        """An adapter is unloaded, its files are rewritten, and it is loaded under the same name."""
        model, path = self._model(root), self._adapter(root / "adapter", 1)
        with self._open(bench, model, {"x": path}) as llm:
            first = self._ask(llm, "x")
            llm.adapters.unload("x")
            if not self.sabotaged:
                self._adapter(path, 2)
            llm.adapters.load("x", path)
            second = self._ask(llm, "x")
        self._state(facts, first, second, self._fresh(bench, root, 2))

    def _second_name(self, bench: Bench, facts: Facts, root: Path) -> None:
        """The files are rewritten while the former content is loaded, and loaded under another name."""
        model, path = self._model(root), self._adapter(root / "adapter", 1)
        with self._open(bench, model, {"x": path}) as llm:
            first = self._ask(llm, "x")
            self._adapter(path, 2)
            llm.adapters.load("y", path)
            second, again = self._ask(llm, "y"), self._ask(llm, "x")
        self._state(facts, first, second, self._fresh(bench, root, 2))
        self._same(facts, "the loaded adapter keeps its content", again, first)

    def _evicted(self, bench: Bench, facts: Facts, root: Path) -> None:
        """The files are rewritten while the adapter has lost its slot; it is read again when a request names it."""
        model, path = self._model(root), self._adapter(root / "adapter", 1)
        other = self._adapter(root / "other", 3)
        with self._open(bench, model, {"x": path}, adapter_slots=1) as llm:
            first = self._ask(llm, "x")
            llm.adapters.load("other", other)
            self._ask(llm, "other")
            self._adapter(path, 2)
            second = self._ask(llm, "x")
        self._state(facts, first, second, self._fresh(bench, root, 2))

    def _swapped(self, bench: Bench, facts: Facts, root: Path) -> None:
        """Two names exchange their paths."""
        model = self._model(root)
        paths = [self._adapter(root / f"adapter{i}", i) for i in (1, 2)]
        with self._open(bench, model, {"x": paths[0], "y": paths[1]}) as llm:
            first, former_y = self._ask(llm, "x"), self._ask(llm, "y")
            for name in ("x", "y"):
                llm.adapters.unload(name)
            llm.adapters.load("x", paths[1])
            llm.adapters.load("y", paths[0])
            second, y = self._ask(llm, "x"), self._ask(llm, "y")
        self._state(facts, first, second, (former_y, *self._fresh(bench, root, 2)))
        self._same(facts, "the other name has the other content", y, first)

    def _mixed(self, bench: Bench, facts: Facts, root: Path) -> None:
        """The same prompt with another mix weight, and without the adapter."""
        model, path = self._model(root), self._adapter(root / "adapter", 1)
        with self._open(bench, model, {"x": path}) as llm:
            first, second, base = self._ask(llm, "x"), self._ask(llm, {"x": 0.5}), self._ask(llm, None)
        with self._open(bench, model, {"x": path}, prefix_caching=False) as llm:
            half, again = (self._ask(llm, {"x": 0.5}) for _ in range(2))
            plain = self._ask(llm, None)
        self._state(facts, first, second, (half, again))
        self._same(facts, "without the adapter: the base model's answer", base, plain)

    def _merged(self, bench: Bench, facts: Facts, root: Path) -> None:
        """An adapter is merged into the base weights and taken out again."""
        model, path = self._model(root), self._adapter(root / "adapter", 1)
        with self._open(bench, model, {"x": path}) as llm:
            first = self._ask(llm, None)
            llm.adapters.merge("x")
            second = self._ask(llm, None)
            llm.adapters.unmerge()
            again = self._ask(llm, None)
        with self._open(bench, model, {"x": path}, prefix_caching=False) as llm:
            llm.adapters.merge("x")
            merged = [self._ask(llm, None) for _ in range(2)]
        self._state(facts, first, second, merged)
        self._same(facts, "unmerged: the former answer", again, first)

    def _checkpoint(self, bench: Bench, facts: Facts, root: Path) -> None:
        """A checkpoint is rewritten in place, with the same size and time of change."""
        model = self._model(root)
        with self._open(bench, model, {}) as llm:
            first = self._ask(llm, None)
        file = model / "model.safetensors"
        stamp = file.stat()
        if not self.sabotaged:
            _write_model(model, 2)
        _set_times(file, stamp.st_atime_ns, stamp.st_mtime_ns)
        with self._open(bench, model, {}) as llm:
            second = self._ask(llm, None)
        elsewhere = root / "elsewhere"
        shutil.copytree(model, elsewhere)
        with self._open(bench, elsewhere, {}) as llm:
            self._state(facts, first, second, [self._ask(llm, None) for _ in range(2)])

    # -- engines -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _open(self, bench: Bench, model: Path, adapters: Mapping[str, Path], **options: Any) -> Iterator[LLM]:
        from polyaccel import LLM

        settings: dict[str, Any] = {
            "backend": bench.backend,
            "dtype": self.case.dtype,
            "max_num_seqs": 2,
            "max_batched_tokens": 512,
            "kv_cache_bytes": 8 << 20,
            "policy": "allow",
            "threads": 1,
            "timeout": 60.0,
            "adapter_slots": 3,
            "adapter_rank_rows": 32,
            "graphs": False,
            "adapters": adapters or None,
        }
        with LLM(model, **(settings | options)) as llm:
            yield llm

    def _ask(self, llm: LLM, mix: Mix) -> Answer:
        """Of one prompt of several blocks, so that a cached beginning is found if its key does not tell it apart."""
        from polyaccel_conformance.models.answers import ask, greedy

        prompt = self.source.integers("prompt", (PROMPT,), 0, _family().vocabulary - 1).tolist()
        return ask(llm, [prompt], [mix], greedy(TOKENS))[0]

    def _fresh(self, bench: Bench, root: Path, seed: int) -> list[Answer]:
        """Answers of an engine that has only ever seen this content, under another path: the second from its cache."""
        path = self._adapter(root / f"fresh{seed}", seed)
        with self._open(bench, self._model(root), {"fresh": path}) as llm:
            return [self._ask(llm, "fresh") for _ in range(2)]

    def _model(self, root: Path) -> Path:
        folder = root / "model"
        return folder if folder.exists() else _write_model(folder, 1)

    def _adapter(self, folder: Path, seed: int) -> Path:
        from polyaccel_conformance.models.families import SmallAdapter, write_adapter

        # The name is what its content is drawn from.
        adapter = SmallAdapter(name=f"content{seed}", rank=4, alpha=8, modules=("q_proj", "v_proj", "down_proj"))
        return write_adapter(adapter, _family(), folder)

    def _state(self, facts: Facts, former: Answer, got: Answer, wanted: Sequence[Answer]) -> None:
        """``wanted``: the right answer, computed in different ways: their distance is the noise of the device.

        An answer is the right one if it is nearer to it than the geometric mean of the noise and of what the change of
        content makes; the two must be two orders of magnitude apart, or the comparison shows nothing.
        """
        right = wanted[0]
        effect = _distance(former, right)
        rounding = ACCUMULATOR * max(abs(x) for x in right.logprobs)
        noise = max(rounding, *(_distance(right, other) for other in wanted[1:]))
        facts.check("the contents differ in effect", effect > 100 * noise, f"by {effect:.3g}, with noise {noise:.3g}")
        off = _distance(got, right)
        facts.check("the new content answers", off <= math.sqrt(noise * effect), _difference(got, right))
        self._noise = math.sqrt(noise * effect)

    def _same(self, facts: Facts, name: str, got: Answer, wanted: Answer) -> None:
        facts.check(name, _distance(got, wanted) <= self._noise, _difference(got, wanted))


def _family() -> Family:
    from polyaccel_conformance.models.families import Family

    return Family(
        name="identity",
        architecture="LlamaForCausalLM",
        model_type="llama",
        hidden=32,
        intermediate=48,
        heads=4,
        kv_heads=2,
        head_dim=8,
        vocabulary=64,
        layers=2,
    )


def _write_model(folder: Path, seed: int) -> Path:
    from polyaccel_conformance.models.families import write_model

    return write_model(_family(), folder, seed=seed)


def _distance(a: Answer, b: Answer) -> float:
    """Of two answers: the largest difference of log-probabilities, 1 (a factor of e) at most and for other tokens."""
    if a.tokens != b.tokens:
        return 1.0
    return min(max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)), 1.0)


def _difference(a: Answer, b: Answer) -> str:
    return f"tokens {a.tokens} ({a.logprobs[0]:.6f}) instead of {b.tokens} ({b.logprobs[0]:.6f})"


def _set_times(file: Path, accessed: int, modified: int) -> None:
    os.utime(file, ns=(accessed, modified))


_CHANGES: Mapping[str, Drive] = {
    "reloaded": IdentityProblem._reloaded,
    "second_name": IdentityProblem._second_name,
    "evicted": IdentityProblem._evicted,
    "swapped": IdentityProblem._swapped,
    "mixed": IdentityProblem._mixed,
    "merged": IdentityProblem._merged,
    "checkpoint": IdentityProblem._checkpoint,
}


class CacheIdentity(DeviceCheck):
    """Every change of content under a name."""

    operator = "cache.identity"
    weight = 50
    levels = ("L2",)

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32",),
            "structure.change": tuple(_CHANGES),
        }

    def problem(self, case: Case) -> Problem:
        return IdentityProblem(case)
