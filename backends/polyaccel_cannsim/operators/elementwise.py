"""Operators that work element by element, as a table: copies, casts, arithmetic, comparisons, selection.

Each row's document is hicann/ops-math (or ops-nn) <folder>/docs/<page>. All operands may be strided (ticked in every
page). Types that the 310P lacks: BFLOAT16 everywhere (the pages' notes on Atlas inference products).
Floats are computed in float32 (DOUBLE in double) and rounded once; integers in their own type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .descriptor import ALL, FLOATS, NUMBERS, Tensor, broadcast, require, require_dtype, require_rank, store
from .environment import CHIP_310P, Environment
from .operator import Compute, Operator, aclnn
from .refusal import invalid

_DOUBLED = (*FLOATS, torch.float64)


def _types(environment: Environment, allowed: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    if environment.chip == CHIP_310P:
        return tuple(dtype for dtype in allowed if dtype != torch.bfloat16)
    return allowed


def _values(x: Tensor) -> torch.Tensor:
    values = x.view()
    return values.to(torch.float32) if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        raise invalid(f"Expected out to have shape {list(shape)}, but got {list(out.shape)}.")


def _unary(
    name: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    document: str,
    serves: str,
    allowed: tuple[torch.dtype, ...],
    *,
    inplace: str | None = None,
) -> tuple[Operator, ...]:
    """out = function(self), and the in-place form."""

    def check(environment: Environment, x: Tensor, out: Tensor) -> Compute:
        require(self=x, out=out)
        require_dtype("self", x, _types(environment, allowed))
        require_dtype("out", out, _types(environment, ALL))
        require_rank("self", x, 0, 8)
        _check_out(out, x.shape)
        return lambda: store(out, function(_values(x)))

    rows = [aclnn(name, "2*tensor", serves=serves, document=document)(check)]
    if inplace:

        def check_inplace(environment: Environment, x: Tensor) -> Compute:
            return check(environment, x, x)

        rows.append(aclnn(inplace, "tensor", serves=f"{serves}_", document=document)(check_inplace))
    return tuple(rows)


def _binary(
    name: str,
    function: Callable[..., torch.Tensor],
    document: str,
    serves: str,
    signature: str,
    *,
    allowed: tuple[torch.dtype, ...] = ALL,
    inplace: str | None = None,
) -> tuple[Operator, ...]:
    """out = function(self, other, *numbers), broadcast; `other` is a tensor or a number, as the signature says."""

    def check(environment: Environment, x: Tensor, other: Any, *rest: Any) -> Compute:
        *numbers, out = rest
        require(self=x, out=out)
        types = _types(environment, allowed)
        require_dtype("self", x, types)
        require_rank("self", x, 0, 8)
        shape = x.shape
        if signature.startswith("2*tensor"):
            require(other=other)
            require_dtype("other", other, types)
            shape = broadcast(x.shape, other.shape)
        elif other is None:
            require(other=other)
        _check_out(out, shape)

        def compute() -> None:
            right = _values(other) if signature.startswith("2*tensor") else other
            store(out, function(_values(x), right, *numbers))

        return compute

    rows = [aclnn(name, f"{signature} tensor", serves=serves, document=document)(check)]
    if inplace:

        def check_inplace(environment: Environment, x: Tensor, *rest: Any) -> Compute:
            return check(environment, x, *rest, x)

        rows.append(aclnn(inplace, signature, serves=f"{serves}_", document=document)(check_inplace))
    return tuple(rows)


def _add(left: torch.Tensor, right: Any, alpha: Any) -> torch.Tensor:
    return torch.add(left, right if alpha == 1 else right * alpha)


def _subtract(left: torch.Tensor, right: Any, alpha: Any) -> torch.Tensor:
    return torch.sub(left, right if alpha == 1 else right * alpha)


_ROUNDING = {0: None, 1: "trunc", 2: "floor"}  # aclnnDivMod, mode


def _divide(left: Any, right: Any, mode: int = 0) -> torch.Tensor:
    if mode not in _ROUNDING:
        raise invalid(f"mode must be 0, 1 or 2, but is {mode}.")
    return torch.div(left, right, rounding_mode=_ROUNDING[mode])


def _scalar_first_add(environment: Environment, number: Any, other: Tensor, alpha: Any, out: Tensor) -> Compute:
    """aclnnAddV3: number + alpha * other."""
    require(other=other, out=out)
    _check_out(out, other.shape)
    return lambda: store(out, number + _values(other) * alpha)


def _comparison(
    stem: str, function: Callable[[Any, Any], torch.Tensor], folder: str, serves: str
) -> tuple[Operator, ...]:
    document = f"hicann/ops-math math/{folder}/docs/aclnn{stem}%s&aclnnInplace{stem}%s.md"
    return (
        *_binary(f"aclnn{stem}Tensor", function, document % ("Tensor", "Tensor"), serves, "2*tensor"),
        *_binary(f"aclnn{stem}Scalar", function, document % ("Scalar", "Scalar"), serves, "tensor number"),
    )


_MATH = "hicann/ops-math math/"


def _page(folder: str, stem: str, *, alone: bool = False) -> str:
    return f"{_MATH}{folder}/docs/aclnn{stem}{'' if alone else f'&aclnnInplace{stem}'}.md"


ARITHMETIC = (
    *_binary("aclnnAdd", _add, _page("add", "Add"), "add", "2*tensor number", inplace="aclnnInplaceAdd"),
    *_binary("aclnnAdds", _add, _page("add", "Adds", alone=True), "add", "tensor 2*number", inplace="aclnnInplaceAdds"),
    aclnn("aclnnAddV3", "number tensor number tensor", serves="add", document=_page("add", "AddV3"))(_scalar_first_add),
    *_binary("aclnnSub", _subtract, _page("sub", "Sub"), "sub", "2*tensor number", inplace="aclnnInplaceSub"),
    *_binary("aclnnSubs", _subtract, _page("sub", "Subs"), "sub", "tensor 2*number", inplace="aclnnInplaceSubs"),
    *_binary(
        "aclnnRsubs",
        lambda x, other, alpha: other - x * alpha,
        _page("sub", "Rsubs", alone=True),
        "rsub",
        "tensor 2*number",
    ),
    *_binary("aclnnMul", torch.mul, _page("mul", "Mul"), "mul", "2*tensor", inplace="aclnnInplaceMul"),
    *_binary("aclnnMuls", torch.mul, _page("muls", "Muls"), "mul", "tensor number", inplace="aclnnInplaceMuls"),
    *_binary("aclnnDiv", _divide, _page("div", "Div"), "div", "2*tensor", inplace="aclnnInplaceDiv"),
    *_binary("aclnnDivs", _divide, _page("div", "Divs"), "div", "tensor number", inplace="aclnnInplaceDivs"),
    *_binary("aclnnDivMod", _divide, _page("div", "DivMod"), "div", "2*tensor int32"),
    *_binary("aclnnDivMods", _divide, _page("div", "DivMods"), "div", "tensor number int32"),
    *_binary(
        "aclnnMinimum", torch.minimum, _page("minimum", "Minimum", alone=True), "minimum", "2*tensor", allowed=NUMBERS
    ),
    *_binary(
        "aclnnMaximum", torch.maximum, _page("maximum", "Maximum", alone=True), "maximum", "2*tensor", allowed=NUMBERS
    ),
    *_binary(
        "aclnnPowTensorScalar",
        torch.pow,
        f"{_MATH}pow/docs/aclnnPowTensorScalar&aclnnInplacePowTensorScalar.md",
        "pow",
        "tensor number",
    ),
)

COMPARISONS = (
    *_comparison("Eq", torch.eq, "equal", "eq"),
    *_comparison("Ne", torch.ne, "not_equal", "ne"),
    *_comparison("Gt", torch.gt, "greater", "gt"),
    *_comparison("Ge", torch.ge, "greater_equal", "ge"),
    *_comparison("Lt", torch.lt, "less", "lt"),
    *_comparison("Le", torch.le, "less_equal", "le"),
    *_binary("aclnnLogicalAnd", torch.logical_and, _page("logical_and", "LogicalAnd"), "logical_and", "2*tensor"),
    *_binary("aclnnLogicalOr", torch.logical_or, _page("logical_or", "LogicalOr"), "logical_or", "2*tensor"),
)

UNARY = (
    *_unary(
        "aclnnSilu",
        torch.nn.functional.silu,
        "hicann/ops-nn activation/swish/docs/aclnnSilu.md",
        "silu",
        FLOATS,
    ),
    *_unary(
        "aclnnSigmoid",
        torch.sigmoid,
        "hicann/ops-nn activation/sigmoid/docs/aclnnSigmoid&aclnnInplaceSigmoid.md",
        "sigmoid",
        FLOATS,
        inplace="aclnnInplaceSigmoid",
    ),
    *_unary("aclnnTanh", torch.tanh, _page("tanh", "Tanh"), "tanh", FLOATS, inplace="aclnnInplaceTanh"),
    *_unary("aclnnAbs", torch.abs, _page("abs", "Abs", alone=True), "abs", NUMBERS),
    *_unary("aclnnCeil", torch.ceil, _page("ceil", "Ceil"), "ceil", _DOUBLED),
    *_unary("aclnnFloor", torch.floor, _page("floor", "Floor"), "floor", _DOUBLED),
    *_unary("aclnnSqrt", torch.sqrt, _page("sqrt", "Sqrt"), "sqrt", ALL),
    *_unary("aclnnIsFinite", torch.isfinite, _page("is_finite", "IsFinite", alone=True), "isfinite", ALL),
    *_unary("aclnnExp", torch.exp, _page("exp", "Exp"), "exp", (*_DOUBLED, torch.bool, torch.int64)),
    *_unary("aclnnLog", torch.log, _page("log", "Log"), "log", ALL),
    *_unary("aclnnRsqrt", torch.rsqrt, _page("rsqrt", "Rsqrt"), "rsqrt", ALL),
    *_unary("aclnnReciprocal", torch.reciprocal, _page("reciprocal", "Reciprocal"), "reciprocal", ALL),
    *_unary("aclnnNeg", torch.neg, _page("neg", "Neg"), "neg", (*_DOUBLED, torch.int8, torch.int32, torch.int64)),
    *_unary("aclnnCos", torch.cos, _page("cos", "Cos"), "cos", ALL),
    *_unary("aclnnSin", torch.sin, _page("sin", "Sin"), "sin", ALL),
    *_unary("aclnnLogicalNot", torch.logical_not, _page("logical_not", "LogicalNot"), "logical_not", ALL),
)


@aclnn(
    "aclnnInplaceCopy",
    "2*tensor",
    serves="copy_, contiguous, clone, to",
    document="hicann/ops-math conversion/view_copy/docs/aclnnInplaceCopy.md",
)
def inplace_copy(environment: Environment, target: Tensor, source: Tensor) -> Compute:
    """target = source, broadcast and converted; both may be strided."""
    require(selfRef=target, src=source)
    for name, tensor in (("selfRef", target), ("src", source)):
        require_dtype(name, tensor, _types(environment, ALL))
    if broadcast(target.shape, source.shape) != target.shape:
        raise invalid(f"src of shape {list(source.shape)} can not be broadcast to {list(target.shape)}.")
    return lambda: store(target, source.view())


@aclnn(
    "aclnnCast",
    "tensor dtype tensor",
    serves="npu_dtype_cast, to(dtype)",
    document="hicann/ops-math math/cast/docs/aclnnCast.md",
)
def cast(environment: Environment, x: Tensor, dtype: torch.dtype, out: Tensor) -> Compute:
    """out = x in `dtype`, which is out's."""
    require(self=x, out=out)
    for name, tensor in (("self", x), ("out", out)):
        require_dtype(name, tensor, _types(environment, ALL))
    if dtype != out.dtype:
        raise invalid(f"dtype {dtype} must be the data type of out, {out.dtype}.")
    _check_out(out, x.shape)
    return lambda: store(out, x.view())


@aclnn("aclnnSWhere", "4*tensor", serves="where", document="hicann/ops-math math/select/docs/aclnnSWhere.md")
def where(environment: Environment, condition: Tensor, x: Tensor, other: Tensor, out: Tensor) -> Compute:
    """out = x where condition, else other; all three broadcast."""
    require(condition=condition, self=x, other=other, out=out)
    require_dtype("condition", condition, (torch.bool, torch.uint8))
    for name, tensor in (("self", x), ("other", other)):
        require_dtype(name, tensor, _types(environment, ALL))
    _check_out(out, broadcast(condition.shape, x.shape, other.shape))
    return lambda: store(out, torch.where(condition.view().bool(), x.view(), other.view()))


@aclnn(
    "aclnnInplaceMaskedFillScalar",
    "2*tensor number",
    serves="masked_fill",
    document="hicann/ops-math conversion/masked_fill/docs/aclnnInplaceMaskedFillScalar.md",
)
def inplace_masked_fill_scalar(environment: Environment, x: Tensor, mask: Tensor, value: float) -> Compute:
    """x = value where mask."""
    require(selfRef=x, mask=mask)
    allowed = (torch.bool, torch.int8, torch.int32, torch.int64, *FLOATS)
    require_dtype("selfRef", x, _types(environment, allowed))
    require_dtype("mask", mask, (torch.bool,))
    if broadcast(x.shape, mask.shape) != x.shape:
        raise invalid(f"mask of shape {list(mask.shape)} can not be broadcast to {list(x.shape)}.")

    def compute() -> None:
        x.view().masked_fill_(mask.view(), value)

    return compute


@aclnn(
    "aclnnClamp",
    "tensor 2*number tensor",
    serves="clamp",
    document="hicann/ops-math conversion/clip_by_value_v2/docs/aclnnClamp.md",
)
def clamp(environment: Environment, x: Tensor, low: float | None, high: float | None, out: Tensor) -> Compute:
    """x limited to low..high; at least one of them is given."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, ALL))
    if low is None and high is None:
        raise invalid("at least one of clipValueMin and clipValueMax must be given.")
    _check_out(out, x.shape)
    return lambda: store(out, torch.clamp(x.view(), low, high))


OPERATORS = (
    *ARITHMETIC,
    *COMPARISONS,
    *UNARY,
    inplace_copy,
    cast,
    where,
    inplace_masked_fill_scalar,
    clamp,
)
