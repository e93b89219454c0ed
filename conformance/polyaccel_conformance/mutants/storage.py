"""Devices and storage that keep something else than what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from polyaccel.backend import (
    Backend,
    Device,
    Event,
    HostCopy,
    OperatorError,
    PackedAdapter,
    SamplingRow,
    SlotRange,
    TorchDevice,
)
from polyaccel_conformance.harness.overlay import Overlay
from polyaccel_conformance.mutants.mutant import Mutant, changed


class _Ready(HostCopy):
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def wait(self) -> np.ndarray:
        return self._array


class _SharingDevice(TorchDevice):
    def download(self, source: torch.Tensor) -> HostCopy:
        """A host copy is a view of the device's memory."""
        return _Ready(source.detach().numpy())


class _RowsApartDevice(TorchDevice):
    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """The last row of a source with rows apart is taken from the row before."""
        destination.copy_(source)
        if source.dim() == 2 and source.shape[0] > 1 and not source.is_contiguous():
            destination[-1].copy_(source[-2])


class _Devices(Overlay):
    def __init__(self, inner: Backend, kind: type[TorchDevice]) -> None:
        super().__init__(inner)
        self._device = kind("cpu")

    def devices(self) -> Sequence[Device]:
        return (self._device,)


class _Storage(Overlay):
    """A host whose storage passes through ``change`` as the method of this name allocates it."""

    def __init__(self, inner: Backend, method: str, change: Callable[[Any], Any]) -> None:
        super().__init__(inner)
        allocate = getattr(inner, method)
        setattr(self, method, lambda *arguments, **options: change(allocate(*arguments, **options)))


def _keeps_bias(made: Any) -> Any:
    kind: Any = type(made)
    opened: list[bool] = []

    def reopen(weight: Any) -> None:
        kind.reopen(weight)
        opened.append(True)

    def write_bias(weight: Any, *arguments: Any, **options: Any) -> None:
        # Once it has been opened again, the write is checked as it was, and thrown away.
        kept = weight.bias.clone() if opened and weight.bias is not None else None
        kind.write_bias(weight, *arguments, **options)
        if kept is not None:
            weight.bias.copy_(kept)

    return changed(made, reopen=reopen, write_bias=write_bias)


def _drops_when_sealed(made: Any) -> Any:
    kind: Any = type(made)

    def write(weight: Any, *arguments: Any, **options: Any) -> None:
        if not weight._sealed:
            kind.write(weight, *arguments, **options)

    return changed(made, write=write)


def _stays_after_refusal(made: Any) -> Any:
    kind: Any = type(made)

    def write(store: Any, where: SlotRange, packed: PackedAdapter) -> Event:
        before = store._ranges[where.slot], store._ranks[where.slot]
        try:
            event: Event = kind.write(store, where, packed)
        except OperatorError:
            store._ranges[where.slot], store._ranks[where.slot] = before
            raise
        return event

    return changed(made, write=write)


def _first_layer_copied(made: Any) -> Any:
    kind: Any = type(made)

    def copy_blocks(cache: Any, sources: Sequence[int], destinations: Sequence[int]) -> None:
        kept = [(cache.keys(layer).clone(), cache.values(layer).clone()) for layer in range(1, cache.spec.layers)]
        kind.copy_blocks(cache, sources, destinations)
        for layer, (k, v) in enumerate(kept, 1):
            cache.keys(layer).copy_(k)
            cache.values(layer).copy_(v)

    return changed(made, copy_blocks=copy_blocks)


def _sticky_bias(made: Any) -> Any:
    kind: Any = type(made)
    stepped: list[bool] = []

    def write_bias(state: Any, slot: int, row: SamplingRow) -> None:
        if row.bias_ids is not None or not stepped:
            kind._write_bias(state, slot, row)

    def advance(state: Any, *arguments: Any) -> None:
        stepped.append(True)
        kind.advance(state, *arguments)

    def needs(state: Any, slots: np.ndarray) -> Any:
        return kind.needs(state, slots)._replace(bias=state.bias is not None)

    return changed(made, _write_bias=write_bias, advance=advance, needs=needs)


STORAGE: tuple[Mutant, ...] = (
    Mutant(
        name="device.download_is_a_view",
        what="A host copy shares the device's memory.",
        operators=("device.copy_paths", "storage.kv"),
        check="device.copy_paths",
        apply=lambda inner: _Devices(inner, _SharingDevice),
    ),
    Mutant(
        name="device.rows_apart",
        what="A copy from rows that lie apart repeats the last but one.",
        operators=("device.copy_paths", "storage.kv"),
        check="device.copy_paths",
        apply=lambda inner: _Devices(inner, _RowsApartDevice),
    ),
    Mutant(
        name="weight.bias_kept",
        what="A weight that is written again keeps its first bias.",
        operators=("storage.weight", "linear"),
        check="storage.weight",
        apply=lambda inner: _Storage(inner, "allocate_weight", _keeps_bias),
        narrow=True,
    ),
    Mutant(
        name="weight.sealed_writes_ignored",
        what="Writes to a sealed weight are dropped in silence.",
        operators=("storage.weight", "linear"),
        check="storage.weight",
        apply=lambda inner: _Storage(inner, "allocate_weight", _drops_when_sealed),
    ),
    Mutant(
        name="adapters.refused_stays",
        what="After a write that is refused the slot keeps its former adapter.",
        operators=("storage.adapters", "sgmv"),
        check="storage.adapters",
        apply=lambda inner: _Storage(inner, "allocate_adapters", _stays_after_refusal),
    ),
    Mutant(
        name="kv_cache.first_layer_copied",
        what="Blocks are copied in the first layer alone.",
        operators=("storage.kv", "write_kv_cache", "paged_attention"),
        check="storage.kv",
        apply=lambda inner: _Storage(inner, "allocate_kv", _first_layer_copied),
    ),
    Mutant(
        name="sampling.bias_outlives",
        what="A request inherits the bias of one that was sampled in its slot.",
        operators=("storage.sampling", "sample"),
        check="storage.sampling",
        apply=lambda inner: _Storage(inner, "allocate_sampling", _sticky_bias),
    ),
)
