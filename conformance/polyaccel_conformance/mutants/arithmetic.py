"""Wrong arithmetic and wrong indices of dense operators."""

from __future__ import annotations

from typing import Any

import torch

from polyaccel.backend import Backend, Weight
from polyaccel_conformance.mutants.mutant import Altered, Function, Mutant, Wrap, mutant

Tensor = torch.Tensor


def _linear(name: str, what: str, check: str, result: Any, *, narrow: bool = False) -> Mutant:
    """A linear that gives ``result(y, x, w, bias)`` in place of y, for ``w: [n, k]`` and ``bias: [1, n]``."""

    def apply(inner: Backend) -> Backend:
        def wrap(fn: Function) -> Function:
            def linear(x: Tensor, weight: Weight) -> Tensor:
                bias = fn(x.new_zeros((1, weight.spec.k)), weight)
                changed: Tensor = result(fn(x, weight), x, inner.dequantize(weight), bias)
                return changed

            return linear

        return Altered(inner, {"linear": wrap})

    return Mutant(name=name, what=what, operators=("linear",), check=check, apply=apply, narrow=narrow, portable=True)


def _in_chunks(accumulator: torch.dtype, chunk: int) -> Any:
    """The product in chunks of k whose partial sums are kept in ``accumulator``."""

    def product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        total = y.new_zeros(y.shape, dtype=accumulator)
        for begin in range(0, x.shape[1], chunk):
            part = x[:, begin : begin + chunk].float() @ w[:, begin : begin + chunk].float().t()
            total = total + part.to(accumulator)
        return (total.float() + bias.float()).to(y.dtype)

    return product


def _tf32(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return y

    def cut(t: Tensor) -> Tensor:
        return (t.contiguous().view(torch.int32) + 0x1000).bitwise_and(~0x1FFF).view(torch.float32)

    return cut(x) @ cut(w).t() + bias


def _truncated(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    if y.dtype == torch.float32 or not y.numel():
        return y
    exact = x.double() @ w.double().t() + bias.double()
    away = y.double().abs() > exact.abs()
    bits = y.clone().view(torch.int16)
    return torch.where(away & (y != 0), bits - 1, bits).view(y.dtype)


def _last_k(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    if x.shape[1] % 16 != 1 or x.shape[1] < 17:
        return y
    return (x[:, :-1].float() @ w[:, :-1].float().t() + bias.float()).to(y.dtype)


def _one_row(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    if len(y) % 16 == 1 and len(y) > 1 and y.dtype != torch.float32:
        y = y.clone()
        y[-1] = y[-2]
    return y


def _long_k(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    if x.shape[1] <= 4096:
        return y
    return (x[:, :4096].float() @ w[:, :4096].float().t() + bias.float()).to(y.dtype)


def _zeroed(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    if y.shape[1] == 129 and len(y):
        y = y.clone()
        y[0, 128] = 0
    return y


def _bias_twice(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return y + bias if len(y) == 1 else y


def _norm(eps_factor: float = 1.0, low: bool = False, keep_sum: bool = True) -> Wrap:
    def wrap(fn: Function) -> Function:
        def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
            if low and x.dtype == torch.float32:
                s = x if residual is None else x + residual
                scale = torch.rsqrt(s.bfloat16().float().pow(2).mean(-1, keepdim=True) + eps)
                normed = s * scale * weight
                return normed if residual is None else (normed, s)
            result = fn(x, weight, eps * eps_factor, residual)
            if residual is not None and not keep_sum:
                return result[0], residual.clone()
            return result

        return rms_norm

    return wrap


def _layer_norm(fn: Function) -> Function:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if x.shape[-1] < 2:
            return fn(x, weight, bias, eps)  # type: ignore[no-any-return]
        wide = x.float()
        variance = wide.var(-1, keepdim=True, unbiased=True)
        y = (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(variance + eps) * weight.float()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return layer_norm


def _rotary_partial(fn: Function) -> Function:
    def rotary_embedding(q: Tensor, k: Tensor, rope: Any, step: Any) -> Any:
        a, b = fn(q, k, rope, step)
        if rope.rotary_dim < q.shape[-1] and a.numel():
            a = a.clone()
            a[..., rope.rotary_dim :] = 0
        return a, b

    return rotary_embedding


def _rotary_last(fn: Function) -> Function:
    def rotary_embedding(q: Tensor, k: Tensor, rope: Any, step: Any) -> Any:
        a, b = fn(q, k, rope, step)
        return (a, torch.cat((b[:-1], k[-1:])) if len(b) == 33 else b)

    return rotary_embedding


def _silu_swapped(fn: Function) -> Function:
    def silu_and_mul(x: Tensor) -> Tensor:
        n = x.shape[-1] // 2
        y: Tensor = fn(torch.cat((x[..., n:], x[..., :n]), -1) if n % 2 else x)
        return y

    return silu_and_mul


def _gelu_tanh(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")

    return gelu


def _select_last(fn: Function) -> Function:
    def select_rows(x: Tensor, step: Any) -> Tensor:
        y: Tensor = fn(x, step)
        rows = step.input.logits_rows
        if len(rows) > 2 and int(rows[-1]) == len(x) - 1:
            y = y.clone()
            y[-1] = x[int(rows[-2])]
        return y

    return select_rows


def _embedding_outside(fn: Function) -> Function:
    def embedding(weight: Weight, step: Any, vocabulary_start: int) -> Tensor:
        """Ids of other ranks give row 0 in place of zeros."""
        y: Tensor = fn(weight, step, vocabulary_start)
        ids = step.tensor("token_ids") - vocabulary_start
        outside = (ids < 0) | (ids >= weight.spec.n)
        return torch.where(outside[:, None], torch.ones_like(y), y)

    return embedding


def _embedding_last(fn: Function) -> Function:
    def embedding(weight: Weight, step: Any, vocabulary_start: int) -> Tensor:
        """The upper half of 64 m + 1 rows has the other sign."""
        y: Tensor = fn(weight, step, vocabulary_start)
        ids = step.tensor("token_ids") - vocabulary_start
        upper = (ids >= weight.spec.n // 2) & (ids < weight.spec.n)
        return torch.where(upper[:, None], -y, y) if weight.spec.n % 64 == 1 and weight.spec.n > 1 else y

    return embedding


def _one_column(fn: Function) -> Function:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """A row of one element is returned as it is."""
        y: Tensor = fn(x, weight, bias, eps)
        return x.clone() if x.shape[-1] == 1 else y

    return layer_norm


def _norm_tail(fn: Function) -> Function:
    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        """The last of 64 m + 1 columns is divided by nothing."""
        result = fn(x, weight, eps, residual)
        if x.shape[-1] % 64 != 1 or residual is not None:
            return result
        return torch.cat((result[..., :-1], x[..., -1:] * weight[-1:]), -1)

    return rms_norm


def _gelu_tail(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """The first of 64 m + 1 columns passes as it is."""
        y: Tensor = fn(x, approximate)
        return torch.cat((x[..., :1], y[..., 1:]), -1) if x.shape[-1] % 64 == 1 else y

    return gelu


ARITHMETIC: tuple[Mutant, ...] = (
    _linear("linear.bf16_accumulator", "Sums are kept in bfloat16.", "values.exact", _in_chunks(torch.bfloat16, 4)),
    _linear("linear.fp16_accumulator", "Sums are kept in float16.", "values.exact", _in_chunks(torch.float16, 4)),
    _linear(
        "linear.split_k_bf16", "Two halves of k are added in bfloat16.", "values.bound", _in_chunks(torch.bfloat16, 64)
    ),
    _linear("linear.tf32", "float32 operands are rounded to 10 bits.", "values.exact", _tf32),
    _linear("linear.truncating_store", "16-bit results are truncated instead of rounded.", "values.exact", _truncated),
    _linear("linear.last_k_dropped", "The last product is dropped where k mod 16 is 1.", "values.bound", _last_k),
    _linear(
        "linear.tokens_mod_16_is_1",
        "In 16 bits the last row repeats the one before where rows mod 16 are 1.",
        "values.bound",
        _one_row,
        narrow=True,
    ),
    _linear("linear.k_over_4096", "Products beyond k = 4096 are dropped.", "values.bound", _long_k, narrow=True),
    _linear(
        "linear.column_128_zeroed", "Element [0, 128] is zero where n is 129.", "values.bound", _zeroed, narrow=True
    ),
    _linear("linear.bias_twice_at_one_token", "A single row gets the bias twice.", "values.bound", _bias_twice),
    mutant(
        "rms_norm.wrong_eps", "eps is ten times what it should be.", "values.exact", portable=True, rms_norm=_norm(10.0)
    ),
    mutant(
        "rms_norm.low_statistics",
        "The mean square of float32 rows is taken from bfloat16.",
        "values.bound",
        portable=True,
        rms_norm=_norm(low=True),
    ),
    mutant(
        "rms_norm.residual_not_updated",
        "The residual is returned without x.",
        "values.bound",
        portable=True,
        rms_norm=_norm(keep_sum=False),
    ),
    mutant(
        "rms_norm.last_of_65",
        "The last of 64 m + 1 columns is not divided.",
        "values.bound",
        narrow=True,
        portable=True,
        rms_norm=_norm_tail,
    ),
    mutant(
        "layer_norm.unbiased_variance",
        "The variance is divided by n - 1.",
        "values.bound",
        portable=True,
        layer_norm=_layer_norm,
    ),
    mutant(
        "layer_norm.one_column",
        "A row of one element is returned as it is.",
        "values.bound",
        narrow=True,
        portable=True,
        layer_norm=_one_column,
    ),
    mutant(
        "rotary.rest_zeroed", "Dimensions beyond rotary_dim are zero.", "values.exact", rotary_embedding=_rotary_partial
    ),
    mutant(
        "rotary.last_of_33",
        "The last key of 33 tokens is not rotated.",
        "values.bound",
        narrow=True,
        rotary_embedding=_rotary_last,
    ),
    mutant(
        "silu.halves_swapped",
        "Gate and up are swapped where n is odd.",
        "values.bound",
        portable=True,
        silu_and_mul=_silu_swapped,
    ),
    mutant(
        "gelu.always_tanh", "The exact form is approximated by tanh.", "values.bound", portable=True, gelu=_gelu_tanh
    ),
    mutant(
        "gelu.first_of_65",
        "The first of 64 m + 1 columns passes as it is.",
        "values.bound",
        narrow=True,
        portable=True,
        gelu=_gelu_tail,
    ),
    mutant(
        "select_rows.last",
        "The last of three or more rows is the one before where it is the last token.",
        "values.exact",
        select_rows=_select_last,
    ),
    mutant(
        "embedding.outside",
        "Ids of other ranks give ones instead of zeros.",
        "values.exact",
        embedding=_embedding_outside,
    ),
    mutant(
        "embedding.half_of_65",
        "The upper half of 64 m + 1 rows has the other sign.",
        "values.bound",
        narrow=True,
        embedding=_embedding_last,
    ),
)
