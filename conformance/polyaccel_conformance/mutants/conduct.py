"""Right numbers obtained in wrong ways: memory, layouts, aliases, declarations, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from polyaccel.backend import Backend, Numerics, Query, Weight
from polyaccel_conformance.harness.overlay import Overlay
from polyaccel_conformance.mutants.mutant import Function, Mutant, Wrap, mutant, redeclared

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


def _past_the_end(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """One element behind its input is cleared."""
        y: Tensor = fn(x, approximate)
        end = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        if x.numel() and (end + 1) * x.element_size() <= x.untyped_storage().nbytes():
            x.as_strided((1,), (1,), end).zero_()
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


def _once_right() -> Wrap:
    def wrap(fn: Function) -> Function:
        calls = [0]

        def silu_and_mul(x: Tensor) -> Tensor:
            """Every third call is off by one unit in the last place."""
            y: Tensor = fn(x)
            calls[0] += 1
            return torch.nextafter(y, y + 1) if calls[0] % 3 == 0 and y.dtype == torch.float32 else y

        return silu_and_mul

    return wrap


def _by_batch(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        """Results depend on the number of rows within rounding."""
        y: Tensor = fn(x)
        return torch.nextafter(y, y + 1) if len(x) > 16 and y.dtype == torch.float32 else y

    return silu_and_mul


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

        return Overlay(inner, {operator: [replace(entry, supports=supports) for entry in inner.table()[operator]]})

    return apply


def _lenient(fn: Function) -> Function:
    def linear(x: Tensor, weight: Weight) -> Tensor:
        """Of rows that are too wide the last columns are taken."""
        y: Tensor = fn(x[..., max(x.shape[-1] - weight.spec.k, 0) :].contiguous(), weight)
        return y

    return linear


def _host_round_trip(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        """Asks the device for a value in the middle of a step."""
        if x.numel() and float(x.reshape(-1)[0].item()) > 1e30:
            return torch.zeros_like(x)
        y: Tensor = fn(x)
        return y

    return silu_and_mul


class _Undisguised(Overlay):
    """Replaced entries whose evidence stays what the host declares."""

    def __init__(self, inner: Backend, operator: str, wrap: Wrap) -> None:
        entries = [replace(entry, fn=wrap(entry.fn)) for entry in inner.table()[operator]]
        super().__init__(inner, {operator: entries})


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
    mutant("rms_norm.alias", "A residual that is x itself is ignored.", "alias.allowed", rms_norm=_aliased),
    mutant(
        "silu.third_call",
        "Every third call differs in the last bit.",
        "invariance.run_to_run",
        silu_and_mul=_once_right(),
    ),
    mutant("silu.batch", "More than 16 rows give other last bits.", "invariance.batch", silu_and_mul=_by_batch),
    mutant("silu.hides_nan", "NaN becomes zero.", "nonfinite.rules", portable=True, silu_and_mul=_masks_nan),
    mutant("gelu.spreads_nan", "NaN reaches the next row.", "nonfinite.rules", portable=True, gelu=_spreads_nan),
    Mutant(
        name="linear.moody_support",
        what="The same query is answered yes, then no.",
        operators=("linear",),
        check="support.pure",
        apply=_moody("linear"),
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
        apply=lambda inner: _Undisguised(inner, "silu_and_mul", _host_round_trip),
    ),
    Mutant(
        name="linear.declares_8_bits",
        what="An accumulator of 8 bits is declared.",
        operators=("linear",),
        check="numerics.measured",
        apply=redeclared("linear", numerics=Numerics(accumulator=torch.bfloat16)),
    ),
)
