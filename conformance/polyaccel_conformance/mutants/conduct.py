"""Right numbers obtained in wrong ways: memory, layouts, aliases, declarations, errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from polyaccel.backend import Backend, Numerics, Query, Weight
from polyaccel_conformance.mutants.mutant import Function, Mutant, mutant, redeclared, undisguised

Tensor = torch.Tensor


def _tail_unwritten(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        y: Tensor = fn(x)
        if len(y) != 33:
            return y
        out = torch.empty_like(y)
        out[:-1] = y[:-1]
        return out

    return silu_and_mul


def _behind(x: Tensor) -> Tensor | None:
    """The element that follows an operand in its memory, where there is one."""
    end = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    if not x.numel() or (end + 1) * x.element_size() > x.untyped_storage().nbytes():
        return None
    return x.as_strided((1,), (1,), end)


def _past_the_end(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """One element behind its input is cleared."""
        y: Tensor = fn(x, approximate)
        behind = _behind(x)
        if behind is not None:
            behind.zero_()
        return y

    return gelu


def _scales_input(fn: Function) -> Function:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y: Tensor = fn(x, weight, bias, eps)
        if x.dtype == torch.float16:
            x.mul_(0.5)
        return y

    return layer_norm


def _reads_gap(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """Rows are taken to be dense."""
        if x.dim() == 2 and x.numel() and x.stride(0) != x.shape[1]:
            x = x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset())
        y: Tensor = fn(x, approximate)
        return y

    return gelu


def _new_memory(fn: Function) -> Function:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Adds to memory that it never cleared, times zero."""
        y: Tensor = fn(x, weight, bias, eps)
        return y + torch.empty_like(y) * 0

    return layer_norm


def _aliased(fn: Function) -> Function:
    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        """Wrong where the residual is x itself."""
        if residual is not None and x.numel() and residual.data_ptr() == x.data_ptr():
            return fn(x, weight, eps, torch.zeros_like(x))
        return fn(x, weight, eps, residual)

    return rms_norm


def _once_right(fn: Function) -> Function:
    calls = [0]

    def silu_and_mul(x: Tensor) -> Tensor:
        """Every third call is off by one unit in the last place."""
        y: Tensor = fn(x)
        calls[0] += 1
        return torch.nextafter(y, y + 1) if calls[0] % 3 == 0 and y.dtype == torch.float32 else y

    return silu_and_mul


def _by_batch(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        """Results depend on the number of rows within rounding."""
        y: Tensor = fn(x)
        return torch.nextafter(y, y + 1) if len(x) > 2 and y.dtype == torch.float32 else y

    return silu_and_mul


def _before_the_operand(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """Where the input is zero the element before the operand is passed on, which mostly is zero as well."""
        y: Tensor = fn(x, approximate)
        if not x.numel() or x.storage_offset() == 0:
            return y
        before = x.as_strided((1,), (1,), x.storage_offset() - 1)
        return torch.where(x == 0, before, y)

    return gelu


def _behind_the_operand(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """What lies behind the operand is added, times zero."""
        y: Tensor = fn(x, approximate)
        behind = _behind(x)
        return y if behind is None else y + behind * 0

    return gelu


def _copies_rows_apart(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        y: Tensor = fn(x.contiguous(), approximate)
        return y

    return gelu


def _one_memory(fn: Function) -> Function:
    def dense_attention(q: Tensor, k: Tensor, v: Tensor, starts: Any, scale: float, causal: bool = True) -> Tensor:
        """Where keys and values are one tensor, the values are halved."""
        y: Tensor = fn(q, k, v, starts, scale, causal)
        return y * 0.5 if k.numel() and k.data_ptr() == v.data_ptr() else y

    return dense_attention


def _long(y: Tensor) -> Tensor:
    """Where a float32 result has more than 16 bits: exact data give none that has."""
    return (y.contiguous().view(torch.int32) & 0xFF) != 0


def _wandering(fn: Function) -> Function:
    calls = [0]

    def silu_and_mul(x: Tensor) -> Tensor:
        """In each call another element of 33 rows is off by a unit in the last place."""
        y: Tensor = fn(x)
        calls[0] += 1
        if y.dtype != torch.float32 or len(y) != 33 or y.numel() < 64:
            return y
        other = torch.zeros(y.shape, dtype=torch.bool)
        other.view(-1)[7 * calls[0] % y.numel()] = True
        return torch.where(other & _long(y), torch.nextafter(y, y + 1), y)

    return silu_and_mul


def _blurred(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        """Of 33 rows, results with more than 16 bits are off by one in 4096."""
        y: Tensor = fn(x)
        if y.dtype != torch.float32 or len(y) != 33:
            return y
        return torch.where(_long(y), y * (1 + 2.0**-12), y)

    return silu_and_mul


def _route_by_batch(fn: Function) -> Function:
    def moe_route(logits: Tensor, *rest: Any) -> Any:
        """Weights of more than 16 rows are off by a unit in the last place."""
        weights, ids = fn(logits, *rest)
        return torch.where(_long(weights) & (len(logits) > 16), torch.nextafter(weights, weights + 1), weights), ids

    return moe_route


def _nan_in_weight(fn: Function) -> Function:
    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        """NaN in the weight becomes one."""
        return fn(x, torch.where(weight.isnan(), 1.0, weight).to(weight.dtype), eps, residual)

    return rms_norm


def _masks_nan(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        """NaN becomes zero."""
        y: Tensor = fn(x)
        return torch.nan_to_num(y, nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    return silu_and_mul


def _spreads_nan(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """A row with NaN spoils the next one."""
        y: Tensor = fn(x, approximate).clone()
        bad = y.isnan().any(-1)
        if len(y) > 1 and y.dim() == 2:
            y[1:][bad[:-1]] = torch.nan
        return y

    return gelu


def _moody(operator: str) -> Callable[[Backend], Backend]:
    def apply(inner: Backend) -> Backend:
        asked = [0]

        def supports(query: Query) -> list[str]:
            asked[0] += 1
            return ["not today"] if asked[0] % 2 == 0 else []

        return redeclared(operator, supports=supports)(inner)

    return apply


def _never_the_same(query: Query) -> list[str]:
    return [f"at {time.monotonic_ns()} there was no room for a kernel"]


def _lenient(fn: Function) -> Function:
    def linear(x: Tensor, weight: Weight) -> Tensor:
        """Of rows that are too wide the last columns are taken."""
        wider = x.shape[-1] - weight.spec.k
        y: Tensor = fn(x[..., wider:].contiguous() if wider > 0 else x, weight)
        return y

    return linear


def _host_round_trip(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        """Asks the device for a value in the middle of a step."""
        if x.numel() and float(x[(0,) * x.dim()].item()) > 1e30:
            return torch.zeros_like(x)
        y: Tensor = fn(x)
        return y

    return silu_and_mul


SUMMING = ("linear", "rms_norm", "layer_norm")


def _declare(numerics: Numerics) -> Callable[[Backend], Backend]:
    def apply(inner: Backend) -> Backend:
        for operator in SUMMING:
            inner = redeclared(operator, numerics=numerics)(inner)
        return inner

    return apply


CONDUCT: tuple[Mutant, ...] = (
    mutant(
        "silu.tail_unwritten",
        "The last of 33 rows is never written.",
        "memory.unwritten",
        narrow=True,
        portable=True,
        silu_and_mul=_tail_unwritten,
    ),
    mutant("gelu.writes_past_the_end", "One element behind the input is cleared.", "memory.writes", gelu=_past_the_end),
    mutant(
        "layer_norm.halves_its_input", "float16 input is halved in place.", "memory.inputs", layer_norm=_scales_input
    ),
    mutant(
        "layer_norm.reads_new_memory",
        "Memory that was never written is added, times zero.",
        "memory.reads",
        layer_norm=_new_memory,
    ),
    mutant("gelu.ignores_strides", "Rows are taken to be dense.", "layout.arguments", gelu=_reads_gap),
    mutant(
        "gelu.zero_from_before",
        "Zeros are taken from before the operand.",
        "memory.unwritten",
        gelu=_before_the_operand,
    ),
    mutant(
        "gelu.adds_what_follows",
        "What lies behind the operand is added, times zero.",
        "memory.reads",
        gelu=_behind_the_operand,
    ),
    mutant(
        "gelu.copies_uncounted", "A copy for the layout is not counted.", "layout.arguments", gelu=_copies_rows_apart
    ),
    mutant(
        "dense_attention.keys_are_values",
        "Values that are the keys' memory are halved.",
        "alias.allowed",
        dense_attention=_one_memory,
    ),
    mutant(
        "silu.wandering_bit",
        "In each call another element of 33 rows is off by a bit.",
        "invariance.run_to_run",
        narrow=True,
        silu_and_mul=_wandering,
    ),
    mutant(
        "silu.blurred_33",
        "Of 33 rows, long results are off by one in 4096.",
        "values.bound",
        narrow=True,
        silu_and_mul=_blurred,
    ),
    mutant(
        "moe_route.batch",
        "Weights of more than 16 rows have other last bits.",
        "invariance.batch",
        moe_route=_route_by_batch,
    ),
    mutant(
        "rms_norm.hides_nan_in_weight", "NaN in the weight becomes one.", "nonfinite.rules", rms_norm=_nan_in_weight
    ),
    mutant("rms_norm.alias", "A residual that is x itself is ignored.", "alias.allowed", rms_norm=_aliased),
    mutant(
        "silu.third_call",
        "Every third call differs in the last bit.",
        "invariance.run_to_run",
        silu_and_mul=_once_right,
    ),
    mutant("silu.batch", "More than two rows give other last bits.", "invariance.batch", silu_and_mul=_by_batch),
    mutant("silu.hides_nan", "NaN becomes zero.", "nonfinite.rules", portable=True, silu_and_mul=_masks_nan),
    mutant("gelu.spreads_nan", "NaN reaches the next row.", "nonfinite.rules", portable=True, gelu=_spreads_nan),
    Mutant(
        name="linear.moody_support",
        what="The same query is answered yes, then no.",
        operators=("linear",),
        check="support.pure",
        apply=_moody("linear"),
    ),
    Mutant(
        name="silu.refuses_by_the_clock",
        what="Everything is refused, each time with another reason.",
        operators=("silu_and_mul",),
        check="support.pure",
        apply=redeclared("silu_and_mul", supports=_never_the_same),
    ),
    mutant(
        "linear.lenient",
        "Rows that are too wide are cut in silence.",
        "errors.arguments",
        linear=_lenient,
    ),
    Mutant(
        name="silu.reads_back",
        what="A value is read back from the device inside the step.",
        operators=("silu_and_mul",),
        check="evidence.native",
        apply=lambda inner: undisguised(inner, "silu_and_mul", _host_round_trip),
    ),
    Mutant(
        name="dense.declare_8_bits",
        what="Accumulators of 8 bits are declared.",
        operators=SUMMING,
        check="numerics.measured",
        apply=_declare(Numerics(accumulator=torch.bfloat16)),
    ),
)
