"""The composites by operator name, with exactly the arguments of the specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.composite import attention, dense, lora, moe, sampling
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.step import Step
from polyaccel.backend.weight import Weight

if TYPE_CHECKING:
    from polyaccel.backend.backend import Backend


class CompositeOperators:
    """The plain-torch form of every operator but ``linear`` and ``dequantize``, which every backend brings.

    A weight is only seen through the backend's own ``dequantize``, so that they work with any Weight class.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._dequantize_operator: Callable[..., object] | None = None

    def table(self) -> Mapping[str, Callable[..., object]]:
        return {
            "embedding": self.embedding,
            "rms_norm": dense.rms_norm,
            "layer_norm": dense.layer_norm,
            "rotary_embedding": dense.rotary_embedding,
            "silu_and_mul": dense.silu_and_mul,
            "gelu": dense.gelu,
            "select_rows": dense.select_rows,
            "write_kv_cache": attention.write_kv_cache,
            "paged_attention": attention.paged_attention,
            "dense_attention": attention.dense_attention,
            "sgmv": lora.sgmv,
            "sgmv_shrink": lora.sgmv_shrink,
            "sgmv_expand": lora.sgmv_expand,
            "moe_route": moe.moe_route,
            "moe_experts": self.moe_experts,
            "sample": sampling.sample,
            "all_reduce": all_reduce,
            "all_gather": all_gather,
            "reduce_scatter": reduce_scatter,
            "all_to_all": all_to_all,
            "broadcast": broadcast,
            "barrier": barrier,
        }

    def embedding(self, weight: Weight, step: Step, vocabulary_start: int) -> torch.Tensor:
        return dense.embedding(self._dequantize(weight), weight.spec, step, vocabulary_start)

    def moe_experts(
        self,
        x: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        ids: torch.Tensor,
        weights: torch.Tensor,
        step: Step,
        act: str = "silu",
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return moe.moe_experts(x, gate_up, down, ids, weights, step, act, expert_map, dequantize=self._dequantize)

    def _dequantize(self, weight: Weight) -> torch.Tensor:
        if self._dequantize_operator is None:
            self._dequantize_operator = self._backend.table()["dequantize"][0].fn
        result = self._dequantize_operator(weight)
        if not isinstance(result, torch.Tensor):
            raise OperatorError(
                "dequantize", f"returned {type(result).__name__} for {weight.spec.site!r}, expected a tensor"
            )
        return result


def all_reduce(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Sum over ranks, in place."""
    return comm.all_reduce(x)


def all_gather(x: torch.Tensor, comm: Communicator, dim: int = -1) -> torch.Tensor:
    """Joined along ``dim`` in rank order."""
    return comm.all_gather(x, dim)


def reduce_scatter(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Sum over ranks, this rank's rows."""
    return comm.reduce_scatter(x)


def all_to_all(x: torch.Tensor, comm: Communicator, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
    """Rows exchanged by the counts."""
    return comm.all_to_all(x, send_rows, receive_rows)


def broadcast(x: torch.Tensor, comm: Communicator, source: int = 0) -> torch.Tensor:
    """The source's content, in place."""
    return comm.broadcast(x, source)


def barrier(comm: Communicator) -> None:
    """Returns when every rank has called it."""
    comm.barrier()
