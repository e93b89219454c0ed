"""Cases of ``write_kv_cache``: every bit of every slot counts, the untouched ones too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import DeviceState, KVCache, KVSpec, TokenClass
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS, bits_of
from polyaccel_conformance.harness.state import rest_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.rows import TOKENS, poison_row
from polyaccel_conformance.problems.steps import BLOCK_ORDERS, Paging, build_step

LAYERS = 2

UNSTORED = ("none", "some", "first", "last", "all")
"""Which tokens have slot -1."""


class WriteKVCacheProblem(Problem):
    """Keys and values of this step's tokens at their slots; tokens of up to three sequences with older contexts."""

    exact = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        tokens = case.dim("tokens")
        shape = (tokens, case.dim("kv_heads"), case.dim("head_dim"))
        self.operands = {}
        for name in ("k", "v"):
            x = self.source.normal(name, shape)
            if case.data == "nonfinite":
                x = poison_row(self.source, x)
                x[::3] = np.inf
            elif case.data == "zeros":
                x = np.where(self.source.integers(f"{name} sign", shape, 0, 1), 0.0, -0.0)
            self.operands[name] = Operand.rounded(x, case.dtype)
        self.unstored = self._unstored(tokens)
        self.kept = np.setdiff1d(np.arange(tokens), self.unstored)
        if case.structure["decode"]:
            self.queries = [1] * tokens
        else:
            self.queries = [tokens - tokens // 2, tokens // 3, tokens // 2 - tokens // 3]
        older = self.source.integers("older", (len(self.queries),), 0, 20).tolist()
        self.contexts = [q + old for q, old in zip(self.queries, older, strict=True)]
        # The first sequence's last token lies in the very last slot of the cache.
        self.to_the_end = case.seed % 2 == 0 and bool(self.queries) and self.queries[0] > 0

    def _unstored(self, tokens: int) -> npt.NDArray[np.int64]:
        pattern, every = self.case.structure["unstored"], np.arange(tokens, dtype=np.int64)
        if pattern == "some":
            return every[self.source.uniform("unstored", (tokens,)) < 0.4]
        return {"first": every[:1], "last": every[-2:], "all": every}.get(str(pattern), every[:0])

    def prepare(self, bench: Bench) -> Prepared:
        case, size = self.case, bench.backend.kv_block_size()
        contexts = list(self.contexts)
        if self.to_the_end:
            contexts[0] = -(-contexts[0] // size) * size
        paging = Paging.of(self.source, self.queries, contexts, size, str(case.structure["blocks"]))
        if self.to_the_end:
            paging = paging.first_at_the_end(contexts)
        decode = bool(case.structure["decode"])
        step = build_step(
            self.source,
            self.queries,
            contexts=contexts,
            paging=paging,
            unstored=self.unstored.tolist(),
            decode=decode,
        )
        spec = kv_spec(case, paging, LAYERS)
        kv = bench.backend.allocate_kv(spec, bench.device)
        layer = case.attributes["layer"]
        assert isinstance(layer, int)
        every = np.arange(spec.blocks * size, dtype=np.int64)
        filling = self._filling(len(every))
        reverse = filling.flip(0)

        def refill() -> None:
            for index in range(LAYERS):
                fill(bench, kv, index, every, filling, reverse)

        def again() -> Mapping[str, object]:
            refill()
            return {"step": bench.begin_step(step, DeviceState(kv=kv))}

        refill()
        written = step.kv_slots[self.kept]
        rest = rest_of(len(every), written)

        untouched = filling[rest], reverse[rest]

        def collect(result: object, _: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            k, v = stored(bench, kv, layer, written)
            changed = 0
            for index in range(LAYERS):
                slots, before = (rest, untouched) if index == layer else (every, (filling, reverse))
                for now, old in zip(stored(bench, kv, index, slots), before, strict=True):
                    changed += int(torch.count_nonzero(now != old))
            return {"k": canonical(k), "v": canonical(v), "changed elsewhere": torch.tensor([changed])}

        return Prepared(
            arguments={"kv": kv, "layer": layer, "step": bench.begin_step(step, DeviceState(kv=kv))},
            collect=collect,
            static={
                "dtype": case.dtype,
                "kv_heads": case.dim("kv_heads"),
                "head_dim": case.dim("head_dim"),
                "world_size": 1,
            },
            ranges={"tokens": (case.dim("tokens"), max(case.dim("tokens"), 1))},
            token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
            again=again,
        )

    def _filling(self, slots: int) -> torch.Tensor:
        """What the cache holds before: values that tell slots apart."""
        shape = (slots, self.case.dim("kv_heads"), self.case.dim("head_dim"))
        # Small integers are exact in every format.
        return torch.from_numpy(self.source.integers("filling", shape, -120, 120)).to(FORMATS[self.case.dtype].torch)

    def expected(self) -> Mapping[str, Expected | Exactly]:
        bits = {name: canonical(x.torch()[torch.from_numpy(self.kept)]).numpy() for name, x in self.operands.items()}
        return {
            **{name: Exactly(values=found.astype(np.int64)) for name, found in bits.items()},
            "changed elsewhere": Exactly(values=np.zeros(1, dtype=np.int64)),
        }

    def digests(self) -> dict[str, str]:
        return super().digests() | {"unstored": Operand(self.unstored, "int64").digest()}


class WriteKVCacheProblems(ProblemSet):
    """Any slots in any order; padding tokens are not stored."""

    operator = "write_kv_cache"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.kv_heads": (1, 2, 3, 8),
            "dims.head_dim": (64, 1, 7, 33, 80, 128, 256),
            "attributes.layer": (0, LAYERS - 1),
            "layouts.k": ("contiguous", "row_padded", "offset"),
            "layouts.v": ("contiguous", "row_padded", "offset"),
            "structure.blocks": BLOCK_ORDERS,
            "structure.unstored": UNSTORED,
            "structure.decode": (False, True),
            "data": ("normal", "zeros", "nonfinite"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.kv_heads": (1, 8), "dims.head_dim": (1, 256)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        tokens, kv_heads, head_dim = (axes[f"dims.{name}"] for name in ("tokens", "kv_heads", "head_dim"))
        assert isinstance(tokens, int)
        assert isinstance(kv_heads, int)
        assert isinstance(head_dim, int)
        # Every sequence of a decode step has blocks of its own, and all of the cache is compared.
        if axes["structure.decode"]:
            axes["dims.tokens"] = tokens = min(tokens, 7)
        if kv_heads * head_dim > 256:
            axes["dims.kv_heads"] = max(256 // head_dim, 1)
        return axes

    def problem(self, case: Case) -> Problem:
        return WriteKVCacheProblem(case)


def kv_spec(case: Case, paging: Paging, layers: int) -> KVSpec:
    """A cache that holds the paging's blocks."""
    return KVSpec(
        layers=layers,
        kv_heads=case.dim("kv_heads"),
        head_dim=case.dim("head_dim"),
        dtype=FORMATS[case.dtype].torch,
        blocks=paging.blocks,
        block_size=paging.block_size,
    )


def fill(bench: Bench, kv: KVCache, layer: int, slots: npt.NDArray[np.int64], k: torch.Tensor, v: torch.Tensor) -> None:
    """Put host keys and values ``[slots, kv_heads, head_dim]`` into the cache."""
    if len(slots):
        kv.write(layer, bench.upload(torch.from_numpy(slots)), bench.upload(k), bench.upload(v))


def stored(bench: Bench, kv: KVCache, layer: int, slots: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some slots, on the host."""
    k, v = kv.read(layer, bench.upload(torch.from_numpy(slots)))
    bench.synchronize()
    return k.cpu(), v.cpu()


def canonical(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns as integers, with one pattern for every NaN."""
    host = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    return torch.from_numpy(bits_of(host).copy())
