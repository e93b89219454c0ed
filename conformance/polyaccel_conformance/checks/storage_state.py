"""``storage.kv`` and ``storage.sampling``: the KV cache and the sampling state hold what was written, slot by slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import DeviceState, KVCache, KVSpec, SampleOutput, SamplingRow, SamplingSpec, SamplingState
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.device_check import DeviceCheck, DeviceProblem, Facts
from polyaccel_conformance.formats import FORMATS, to_torch
from polyaccel_conformance.problem import Prepared, Problem
from polyaccel_conformance.problems.steps import build_step

Ints = npt.NDArray[np.int64]


class CacheProblem(DeviceProblem):
    """Fill everything, overwrite some tokens, drop others (slot -1), copy blocks; then read everything."""

    def drive(self, bench: Bench, facts: Facts) -> None:
        case = self.case
        size = bench.backend.kv_block_size()
        spec = KVSpec(
            layers=case.dim("layers"),
            kv_heads=case.dim("kv_heads"),
            head_dim=case.dim("head_dim"),
            dtype=FORMATS[case.dtype].torch,
            blocks=case.dim("blocks"),
            block_size=size,
        )
        cache = bench.backend.allocate_kv(spec, bench.device)
        total = spec.blocks * size
        held = [self._drawn(spec, f"first {layer}", total) for layer in range(spec.layers)]
        order = self.source.permutation("order", total)
        for layer, (k, v) in enumerate(held):
            self._write(bench, cache, layer, order, k[order], v[order])
        self._compare(bench, facts, "filled", cache, held)
        self._overwrite(bench, cache, held)
        self._compare(bench, facts, "some overwritten, others dropped", cache, held)
        self._copy(cache, held, size)
        self._compare(bench, facts, "blocks copied", cache, held)
        cache.copy_blocks([], [])
        self._compare(bench, facts, "no block copied", cache, held)
        facts.check("nbytes: what is held", cache.nbytes >= spec.bytes_per_block() * spec.blocks, f"{cache.nbytes}")

    def _overwrite(self, bench: Bench, cache: KVCache, held: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Of the last layer alone."""
        spec = cache.spec
        total, layer = spec.blocks * spec.block_size, spec.layers - 1
        count = min(self.case.dim("tokens"), total)
        slots = self.source.choose("overwritten", total, count)
        dropped = self.source.integers("dropped", (count,), 0, 2) == 0
        k, v = self._drawn(spec, "second", count)
        self._write(bench, cache, layer, np.where(dropped, -1, slots), k, v)
        kept = torch.from_numpy(np.flatnonzero(~dropped))
        for stored, new in zip(held[layer], (k, v), strict=True):
            stored[torch.from_numpy(slots)[kept]] = new[kept]

    def _copy(self, cache: KVCache, held: list[tuple[torch.Tensor, torch.Tensor]], size: int) -> None:
        """To other blocks; with ``fan``, one source goes to several of them."""
        blocks = self.source.permutation("blocks", cache.spec.blocks).tolist()
        half = len(blocks) // 2
        sources, destinations = blocks[:half], blocks[half : 2 * half]
        if self.case.structure["fan"] and half:
            sources = sources[:1] * half
        if not self.sabotaged:
            cache.copy_blocks(sources, destinations)
        for source, destination in zip(sources, destinations, strict=True):
            for pair in held:
                for stored in pair:
                    block = stored[source * size : (source + 1) * size].clone()
                    stored[destination * size : (destination + 1) * size] = block

    def _write(self, bench: Bench, cache: KVCache, layer: int, slots: Ints, k: torch.Tensor, v: torch.Tensor) -> None:
        cache.write(layer, bench.upload(torch.from_numpy(slots.astype(np.int64))), bench.upload(k), bench.upload(v))

    def _compare(
        self, bench: Bench, facts: Facts, when: str, cache: KVCache, held: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        spec = cache.spec
        order = self.source.permutation(f"read {when}", spec.blocks * spec.block_size)
        slots = torch.from_numpy(order)
        for layer, pair in enumerate(held):
            found = cache.read(layer, bench.upload(slots))
            bench.synchronize()
            for name, got, stored in zip(("keys", "values"), found, pair, strict=True):
                facts.same(f"{when}: {name} of layer {layer}", got, stored[slots])

    def _drawn(self, spec: KVSpec, name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (2, tokens, spec.kv_heads, spec.head_dim)
        both = to_torch(FORMATS[self.case.dtype].round(self.source.normal(name, shape)), self.case.dtype)
        return both[0], both[1]


class CacheStorage(DeviceCheck):
    """The KV cache in the backend's own block size."""

    operator = "storage.kv"
    levels = ("L2",)

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.layers": (1, 2, 3),
            "dims.kv_heads": (1, 2, 3),
            "dims.head_dim": (8, 1, 16, 33),
            "dims.blocks": (2, 1, 3, 5),
            "dims.tokens": (3, 0, 1, 17, 64),
            "structure.fan": (False, True),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.blocks": (1, 6), "dims.tokens": (0, 80), "dims.head_dim": (1, 40)}

    def problem(self, case: Case) -> Problem:
        return CacheProblem(case)


class SamplingStateProblem(DeviceProblem):
    """A request in each slot; then some are replaced by requests that ask for nothing.

    Logits are equal, so that the id tells which penalties, biases and masks are in force: greedy rows take the lowest
    id that nothing moves.
    """

    def drive(self, bench: Bench, facts: Facts) -> None:
        slots, vocabulary = self.case.dim("slots"), self.case.dim("vocabulary")
        spec = SamplingSpec(request_slots=slots, vocabulary=vocabulary, max_top_logprobs=2)
        state = bench.backend.allocate_sampling(spec, bench.device)
        last = state.last_tokens()
        facts.check("last tokens: int64 of each slot", last.dtype == torch.int64 and last.shape == (slots,), f"{last}")
        favourites = self.source.integers("favourites", (slots,), 0, vocabulary - 1)
        for slot in self.source.permutation("order", slots).tolist():
            state.write(slot, self._moved(int(favourites[slot]), vocabulary))
        everyone = list(range(slots))
        self._expect(bench, facts, "written", state, everyone, favourites.tolist())
        replaced = sorted(self.source.choose("replaced", slots, (slots + 1) // 2).tolist())
        for slot in replaced:
            if self.sabotaged:
                break
            if self.case.structure["cleared"]:
                state.clear(slot)
            state.write(slot, SamplingRow(temperature=0.0))
        # A penalty now weighs on the favourite too, since it was sampled once: all are equal again.
        level = self.case.structure["by"] in ("penalty", "repetition")
        wanted = [0 if level or slot in replaced else int(favourites[slot]) for slot in everyone]
        self._expect(bench, facts, "some replaced", state, everyone, wanted)
        few = replaced[:1]
        self._expect(bench, facts, "one alone", state, few, [0] * len(few))
        bench.synchronize()
        found = state.last_tokens().cpu().tolist()
        facts.check("last tokens: by slot", found == wanted, f"{found} instead of {wanted}")

    def _moved(self, favourite: int, vocabulary: int) -> SamplingRow:
        """A greedy request that only takes ``favourite``, by what the case says."""
        how = self.case.structure["by"]
        others = np.delete(np.arange(vocabulary), favourite)
        if how == "mask":
            return SamplingRow(temperature=0.0, allowed=np.arange(vocabulary) == favourite)
        if how == "forbidden":
            return SamplingRow(temperature=0.0, forbidden_ids=others, forbidden_until=99)
        if how == "penalty":
            return SamplingRow(temperature=0.0, presence_penalty=1.0, output_ids=others)
        if how == "repetition":
            return SamplingRow(temperature=0.0, repetition_penalty=2.0, prompt_ids=others)
        values = np.full(len(others), -1.0, dtype=np.float32)
        return SamplingRow(temperature=0.0, bias_ids=others, bias_values=values)

    def _expect(
        self, bench: Bench, facts: Facts, when: str, state: SamplingState, slots: list[int], wanted: list[int]
    ) -> None:
        vocabulary = state.spec.vocabulary
        logits = bench.upload(torch.full((len(slots), vocabulary), 4.0, dtype=FORMATS[self.case.dtype].torch))
        inputs = build_step(self.source, [1] * len(slots), request_slots=slots, uniforms=np.zeros(len(slots)))
        step = bench.begin_step(inputs, DeviceState(sampling=state))
        prepared = Prepared(arguments={}, collect=lambda result, _: {}, static={"vocabulary": vocabulary})
        result = bench.resolve("sample", prepared).call(logits, state, step)
        bench.synchronize()
        assert isinstance(result, SampleOutput)
        ids = result.ids.cpu().tolist()
        facts.check(f"{when}: ids", ids == wanted, f"{ids} instead of {wanted}")


class SamplingStorage(DeviceCheck):
    """The sampling state by request slot."""

    operator = "storage.sampling"
    levels = ("L2",)

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.slots": (2, 1, 3, 8),
            "dims.vocabulary": (8, 2, 33, 257),
            "structure.by": ("mask", "forbidden", "penalty", "repetition", "bias"),
            "structure.cleared": (True, False),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.slots": (1, 10), "dims.vocabulary": (2, 300)}

    def problem(self, case: Case) -> Problem:
        return SamplingStateProblem(case)
