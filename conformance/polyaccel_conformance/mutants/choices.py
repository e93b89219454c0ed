"""Wrong routing, experts, sampling and dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from polyaccel.backend import SampleOutput, Weight
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel_conformance.mutants.mutant import Function, Mutant, Wrap, mutant

Tensor = torch.Tensor


def _ties_last(fn: Function) -> Function:
    def moe_route(logits: Tensor, top_k: int, *rest: Any) -> Any:
        """Ties go to the highest id: the experts are numbered backwards."""
        if len(rest) > 2 and rest[2] is not None:
            return fn(logits, top_k, *rest)
        if len(rest) > 3 and rest[3] not in (None, 1):
            return fn(logits, top_k, *rest)
        weights, ids = fn(logits.flip(-1).contiguous(), top_k, *rest)
        return weights, logits.shape[-1] - 1 - ids

    return moe_route


def _not_renormalised(fn: Function) -> Function:
    def moe_route(logits: Tensor, top_k: int, scoring: str, renormalise: bool, *rest: Any) -> Any:
        return fn(logits, top_k, scoring, False, *rest)

    return moe_route


def _unscaled(fn: Function) -> Function:
    def moe_route(logits: Tensor, top_k: int, *rest: Any) -> Any:
        weights, ids = fn(logits, top_k, *rest)
        scale = rest[5] if len(rest) > 5 else 1.0
        return (weights / scale if scale == 0.5 else weights), ids

    return moe_route


def _dropped_expert(fn: Function) -> Function:
    def moe_experts(x: Tensor, gate_up: Weight, down: Weight, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        """Rows of the last expert are dropped where it has few."""
        last = int(gate_up.spec.experts or 0) - 1
        hit = ids == last
        if last > 0:
            # Without asking the device how many there are.
            weights = torch.where(hit & (hit.sum() < 6), torch.zeros_like(weights), weights)
        y: Tensor = fn(x, gate_up, down, ids, weights, *rest)
        return y

    return moe_experts


def holding(edit: Callable[[Tensor], Tensor]) -> Wrap:
    """moe_experts with another map of the experts that this rank holds, where there is one."""

    def wrap(fn: Function) -> Function:
        def moe_experts(
            x: Tensor,
            gate_up: Weight,
            down: Weight,
            ids: Tensor,
            weights: Tensor,
            step: Any,
            act: str = "silu",
            held: Tensor | None = None,
        ) -> Tensor:
            y: Tensor = fn(x, gate_up, down, ids, weights, step, act, None if held is None else edit(held))
            return y

        return moe_experts

    return wrap


def _first_choice(fn: Function) -> Function:
    def moe_experts(x: Tensor, gate_up: Weight, down: Weight, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        """All of a token's experts get the weight of its first."""
        y: Tensor = fn(x, gate_up, down, ids, weights[:, :1].expand_as(weights).contiguous(), *rest)
        return y

    return moe_experts


def _sampled(edit: Any) -> Any:
    def wrap(fn: Function) -> Function:
        def sample(logits: Tensor, state: Any, step: Any) -> SampleOutput:
            output: SampleOutput = fn(logits, state, step)
            return replace(output, ids=edit(output.ids.clone(), logits, step))

        return sample

    return wrap


def _highest_tie(ids: Tensor, logits: Tensor, step: Any) -> Tensor:
    if not logits.numel():
        return ids
    values = logits.gather(1, ids[:, None])
    same = logits == values
    last = logits.shape[1] - 1 - same.flip(1).int().argmax(1)
    return torch.where(same.sum(1) > 1, last, ids)


def _batch_dependent(ids: Tensor, logits: Tensor, step: Any) -> Tensor:
    if len(ids) == 8 and logits.shape[1] > 1:
        ids[-1] = (ids[-1] + 1) % logits.shape[1]
    return ids


def _all_chosen(fn: Function) -> Function:
    def moe_route(logits: Tensor, top_k: int, *rest: Any) -> Any:
        """Where every expert is chosen all get the same weight."""
        weights, ids = fn(logits, top_k, *rest)
        return (weights.mean(-1, keepdim=True).expand_as(weights) if top_k == logits.shape[-1] > 1 else weights), ids

    return moe_route


def _low_logits(fn: Function) -> Function:
    def sample(logits: Tensor, state: Any, step: Any) -> Any:
        """float32 logits are rounded to bfloat16."""
        return fn(logits.bfloat16().to(logits.dtype), state, step)

    return sample


def _sign_bit(fn: Function) -> Function:
    def dequantize(weight: Weight) -> Tensor:
        """The highest bit of a packed int4 code is taken as its sign: codes from 8 on are 16 too small."""
        w: Tensor = fn(weight)
        quantisation = weight.spec.quantisation
        if quantisation is None or quantisation.bits != 4 or not w.numel() or not isinstance(weight, TensorWeight):
            return w
        stored = weight.quantised
        assert stored is not None
        codes = torch.stack((stored.codes & 15, stored.codes >> 4), -1).flatten(-2)[..., : weight.spec.k]
        scales = stored.scales.float().repeat_interleave(quantisation.group_size, -1)[..., : weight.spec.k]
        return torch.where(codes >= 8, w.float() - 16 * scales, w.float()).to(w.dtype)

    return dequantize


def _last_group(fn: Function) -> Function:
    def dequantize(weight: Weight) -> Tensor:
        """A last group that is not full uses the one before."""
        w: Tensor = fn(weight)
        quantisation = weight.spec.quantisation
        k = weight.spec.k
        if quantisation is None or k <= quantisation.group_size or k % quantisation.group_size == 0:
            return w
        w = w.clone()
        rest = k % quantisation.group_size
        w[..., k - rest :] = w[..., k - rest - quantisation.group_size : k - quantisation.group_size]
        return w

    return dequantize


CHOICES: tuple[Mutant, ...] = (
    mutant(
        "moe_route.ties_to_highest", "Ties go to the highest id.", "values.exact", portable=True, moe_route=_ties_last
    ),
    mutant(
        "moe_route.never_renormalised",
        "Weights are not divided by their sum.",
        "values.bound",
        moe_route=_not_renormalised,
    ),
    mutant("moe_route.scale_half", "A scale of 0.5 is forgotten.", "values.bound", moe_route=_unscaled),
    mutant(
        "moe_route.all_chosen",
        "Where every expert is chosen all get the same weight.",
        "values.bound",
        narrow=True,
        portable=True,
        moe_route=_all_chosen,
    ),
    mutant(
        "moe_experts.few_rows_of_last",
        "The last expert is skipped where it has up to five rows.",
        "values.exact",
        moe_experts=_dropped_expert,
    ),
    mutant(
        "moe_experts.hole_is_zero",
        "Experts of other ranks are taken for local expert 0.",
        "values.exact",
        moe_experts=holding(lambda held: held.clamp(min=0)),
    ),
    mutant(
        "moe_experts.first_weight",
        "All experts of a token get its first weight.",
        "values.bound",
        moe_experts=_first_choice,
    ),
    mutant("sample.ties_to_highest", "Ties go to the highest id.", "values.exact", sample=_sampled(_highest_tie)),
    mutant(
        "sample.eighth_row", "The last of eight rows is one id off.", "values.exact", sample=_sampled(_batch_dependent)
    ),
    mutant("sample.low_logits", "Logits are rounded to bfloat16.", "values.exact", sample=_low_logits),
    mutant("dequantize.sign_bit", "The highest bit of int4 codes is their sign.", "values.exact", dequantize=_sign_bit),
    mutant(
        "dequantize.last_group",
        "A last group that is not full uses the one before.",
        "values.exact",
        dequantize=_last_group,
    ),
)
