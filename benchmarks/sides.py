"""A decode step here and as its peers would run it: both checked against float64, then timed in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from cuda_model import Model, Stations
from peer_stations import PeerStations, VllmAdapters
from station_errors import ALLOWED, Reference
from turns import Decode, in_turns
from vllm_lora import VllmLora

from polyaccel.backend import Step

OURS, CUBLAS, VLLM = "polyaccel", "cublas", "vllm"
"""The backend's stations; the same step with its products by cuBLAS; that with vLLM's kernels for adapters."""
BASE = {OURS: OURS, VLLM: CUBLAS}
"""Whose step without adapters is the one to compare with."""


def per_rank(model: Model, layer: int | None = None) -> int:
    """Bytes of an adapter for each unit of its rank; of one layer, or of all."""
    prefix = "" if layer is None else f"{layer}."
    adapted = [w for site, w in model.weights.items() if w.spec.rank_rows and site.startswith(prefix)]
    return sum(w.spec.k * len(w.spec.slices) + w.spec.n for w in adapted) * model.dtype.itemsize


def step_bytes(model: Model, batch: int) -> int:
    """What a decode step must read without adapters: weights, keys and values."""
    shape = model.shape
    weights = sum(w.nbytes for site, w in model.weights.items() if site != "embedding")
    keys = 2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize * (model.context + 1)
    return weights + batch * keys


class Sides:
    """One model with adapters of one rank in all its slots, for the backend's stations and, if there are any, for
    the peer's kernels."""

    def __init__(self, model: Model, lora: VllmLora | None, *, rank: int) -> None:
        self.model, self.rank = model, rank
        slots = model.store.slots
        self._adapters = None if lora is None else VllmAdapters(model, lora, slots=slots, rank=rank)
        for slot in range(slots):
            model.store.clear(slot)
        for slot in range(slots):
            model.load_adapter(slot, rank)
            if self._adapters is not None:
                self._adapters.load(slot)

    def stations(self, slots: Sequence[int] | None) -> PeerStations | None:
        """The peer's, with the adapters of these slots, row by row; None if there are no kernels for them."""
        if slots is None:
            return PeerStations(self.model)
        if self._adapters is None:
            return None
        return PeerStations(self.model, self._adapters, self._adapters.rows(slots))

    def checked(self, slots: Sequence[int], ours: Callable[[], Step], plain: Callable[[], Step]) -> dict[str, float]:
        """The worst error of each side in the last layer. ``ours`` names the adapters of the rows, ``plain`` none;
        each is made when its side is run, for a step ends with the next.

        Raises:
            SystemExit: it is above what is allowed.
        """
        reference = Reference(self.model, self.model.shape.layers - 1, slots, self.rank)
        sides: dict[str, tuple[Stations | None, Callable[[], Step]]]
        sides = {OURS: (self.model, ours), VLLM: (self.stations(slots), plain)}
        worst: dict[str, float] = {}
        for name, (stations, step) in sides.items():
            if stations is None:
                continue
            errors = reference.errors(stations, step())
            if not all(error <= ALLOWED for error in errors.values()):
                raise SystemExit(f"{name} is wrong: {errors}")
            worst[name] = max(errors.values())
        return worst

    def decode(
        self, batch: int, mixes: Mapping[str, Sequence[int]], repeats: int, speed: float
    ) -> list[dict[str, object]]:
        """Steps without adapters and with each mix, whose slots are those of the rows.

        Raises:
            SystemExit: an error is too large, or a graph of ours chooses other tokens than its step kernel by kernel.
        """
        model, plain = self.model, functools.partial(self.model.step, batch, None)
        worst: dict[str, dict[str, float]] = {}
        forms = {
            (OURS, "none"): Decode(model, batch),
            (CUBLAS, "none"): Decode(model, batch, None, self.stations(None)),
        }
        for mix, slots in mixes.items():
            worst[mix] = self.checked(slots, functools.partial(model.step, batch, list(slots)), plain)
            forms[OURS, mix] = Decode(model, batch, slots)
            if (stations := self.stations(slots)) is not None:
                forms[VLLM, mix] = Decode(model, batch, None, stations)
        same = {key: form.agreement() for key, form in forms.items()}
        if wrong := [key for key, share in same.items() if key[0] == OURS and share < 1]:
            raise SystemExit(f"batch {batch}, rank {self.rank}: the graph's tokens are others: {wrong}")
        times = in_turns(forms, repeats)
        for form in forms.values():
            form.close()
        rows: list[dict[str, object]] = []
        for (side, mix), took in times.items():
            row: dict[str, object] = {"kernels": side, "batch": batch, "adapters": mix}
            least = step_bytes(model, batch) / speed * 1e3
            if mix != "none":
                added = took - times[BASE[side], "none"]
                floor = len(set(mixes[mix])) * self.rank * per_rank(model) / speed * 1e3
                row |= {"rank": self.rank, "added_ms": round(added, 4), "added": f"{added / (took - added):.1%}"}
                row |= {"added_floor_ms": round(floor, 4), "worst": round(worst[mix][side], 4)}
                least += floor
            row |= {"ms": round(took, 4), "floor_ms": round(least, 4), "of_floor": round(least / took, 3)}
            rows.append({**row, "graph_agrees": same[side, mix]})
            print(rows[-1], flush=True)
        return rows

    def close(self) -> None:
        """The peer's adapters; the model goes on."""
        if self._adapters is not None:
            self._adapters.close()
