"""How a call is issued: what it takes is checked, its kernel is queued through the guarded launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from polyaccel.backend import Communicator, KVCache, Launcher, OperatorError, RowSet, Step

from . import kernels
from .adapter_store import FoldedAdapterStore
from .communicator import FoldedCommunicator
from .device import FoldedDevice
from .kv_cache import FoldedKVCache
from .step import FoldedStep
from .weight import FoldedWeight


class Issuer:
    """Issues kernels on one device. Outputs are allocated, and poisoned, at once; nothing else happens at once."""

    def __init__(self, device: FoldedDevice, launcher: Launcher) -> None:
        self._device, self._launcher = device, launcher

    def _launch(self, kernel: str, operands: Sequence[torch.Tensor | None], run: Callable[[], object]) -> None:
        self._launcher.launch(f"folded.{kernel}", operands, self._device.queue.put, run)


# -- when a call is issued ---------------------------------------------------------------------------------------------


def rank_rows_of(weight: FoldedWeight, step: FoldedStep) -> int:
    store = store_of(step)
    return step.rank_rows if store is not None and store.covers(weight.spec.site) else 0


def store_of(step: FoldedStep) -> FoldedAdapterStore | None:
    store = step.state.adapters
    return store if isinstance(store, FoldedAdapterStore) else None


def issued_step(step: Step) -> FoldedStep:
    if not isinstance(step, FoldedStep):
        raise OperatorError("begin_step", f"a step of this backend is a FoldedStep, not {type(step).__name__}")
    return step


def rows_for(operator: str, x: torch.Tensor, weight: FoldedWeight) -> None:
    """Refuse rows that do not fit a weight; the queue would find out too late."""
    spec = weight.spec
    if x.dim() != 2 or x.shape[1] != spec.k or x.dtype != spec.dtype:
        raise OperatorError.describe(operator, f"{spec.site!r} takes rows of {spec.k} in {spec.dtype}", {"x": x})


def same_width(operator: str, operands: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse operands whose last dimensions differ."""
    given = {name: x for name, x in operands.items() if x is not None}
    if len({x.shape[-1] for x in given.values()}) > 1:
        raise OperatorError.describe(operator, f"{' and '.join(given)} are not of one width", given)


def norms_for(operator: str, width: int, dtype: torch.dtype, **weights: torch.Tensor | None) -> None:
    """Refuse norm weights that are not one of each of ``width`` elements, in ``dtype``."""
    for name, weight in weights.items():
        if weight is not None and (weight.shape != (width,) or weight.dtype != dtype):
            raise OperatorError.describe(operator, f"{name} is not {width} elements of {dtype}", {name: weight})


def choices_for(operator: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Refuse choices of experts that are not ``ids, weights: [tokens, top_k]`` in the contract's dtypes."""
    given = {"ids": ids, "weights": weights}
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise OperatorError.describe(operator, "ids and weights are not [tokens, top_k]", {"x": x, **given})
    for name, dtype in (("ids", torch.int32), ("weights", torch.float32)):
        if given[name].dtype != dtype:
            raise OperatorError.describe(operator, f"{name} is not in {dtype}", {name: given[name]})


def heads_for(operator: str, kv: FoldedKVCache, **operands: torch.Tensor) -> None:
    """Refuse heads that do not fit the cache."""
    for name, x in operands.items():
        if x.dim() != 3 or x.shape[2] != kv.spec.head_dim or x.dtype != kv.spec.dtype:
            raise OperatorError.describe(operator, f"{name} does not fit {kv.spec}", {name: x})


def folded_cache(kv: KVCache) -> FoldedKVCache:
    if not isinstance(kv, FoldedKVCache):
        raise OperatorError("kv", f"takes a FoldedKVCache, not {type(kv).__name__}")
    return kv


def queued(comm: Communicator) -> Communicator:
    if comm.world_size > 1 and not isinstance(comm, FoldedCommunicator):
        raise OperatorError("all_reduce", f"{type(comm).__name__} runs at once and not in the order of the queue")
    return comm


# -- when its kernel runs ----------------------------------------------------------------------------------------------


def adapted(x: torch.Tensor, weight: FoldedWeight, step: FoldedStep, row_set: RowSet) -> torch.Tensor:
    """Linear with the step's adapters, ``[rows, n]`` float32."""
    y, h = kernels.product(x, weight, rank_rows_of(weight, step))
    return expanded(y, h, weight, step, row_set)


def landed(message: torch.Tensor, weight: FoldedWeight, step: FoldedStep) -> torch.Tensor:
    """The sum over ranks, its rank rows expanded, ``[T, n]`` float32."""
    spec = weight.spec
    slices = len(spec.slices)
    h = message[:, spec.n :].float().reshape(message.shape[0], (message.shape[1] - spec.n) // slices, slices)
    return expanded(message[:, : spec.n].float(), h, weight, step, "tokens")


def expanded(y: torch.Tensor, h: torch.Tensor, weight: FoldedWeight, step: FoldedStep, row_set: RowSet) -> torch.Tensor:
    store = store_of(step)
    if store is None or h.shape[1] == 0:
        return y
    return kernels.expand(y, h, step.buffers.mix[row_set][: y.shape[0]], store, weight)
