"""The rules: from one expression to the changed expressions that a check should tell from it.

A rule yields ``(node, replacement)``, mostly for the node itself. ``text`` gives the source of any node.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from polyaccel_conformance.mutation.edit import Kind

Text = Callable[[ast.AST], str]
Replacement = tuple[ast.expr, str]
Rule = Callable[[ast.expr, Text], Iterator[Replacement]]

CASTS = ("float", "to")
COPIES = ("contiguous", "clone", "ascontiguousarray")
MASKS = ("masked_fill", "clamp", "nan_to_num")
RANGES = ("range", "_range", "arange")
BOUNDS = ("minimum", "maximum")


def comparison(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """What differs at equality only, and the opposite; one operator of a chain at a time."""
    if not isinstance(node, ast.Compare):
        return
    operands = [node.left, *node.comparators]
    symbols = [_SYMBOLS[type(op)] for op in node.ops]
    for i, symbol in enumerate(symbols):
        for other in _OTHERS[symbol]:
            changed = [*symbols[:i], other, *symbols[i + 1 :]]
            rest = "".join(f" {s} {text(o)}" for s, o in zip(changed, operands[1:], strict=True))
            yield node, text(operands[0]) + rest


def offset(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """A number one more or less; a slice that begins one later or ends one earlier, a range that ends one earlier."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield node, repr(node.value + 1)
        if isinstance(node.value, int) and node.value > 0:
            yield node, repr(node.value - 1)
    elif isinstance(node, ast.Slice):
        if node.lower is not None and not _is_number(node.lower):
            yield node.lower, f"{text(node.lower)} + 1"
        if node.upper is not None and not _is_number(node.upper):
            yield node.upper, f"{text(node.upper)} - 1"
    elif isinstance(node, ast.Call) and _name(node) in RANGES:
        last = node.args[1] if len(node.args) > 1 else node.args[0]
        if not _is_number(last):
            yield last, f"{text(last)} - 1"


def arithmetic(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """Another operator between the same operands."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OTHER_SIGN:
        yield node, f"({text(node.left)} {_OTHER_SIGN[type(node.op)]} {text(node.right)})"


def cast(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """No conversion to another dtype. Moving to another device is none; wider integers and arrays of numpy, which are
    copied into a typed tensor, give the same."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CASTS:
        if node.args and text(node.args[0]).endswith(("device", "int16", "int64")):
            return
        yield node, text(node.func.value)


def contiguous(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """No copy into a dense tensor of its own."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return
    if node.func.attr in COPIES:
        yield node, text(node.args[0] if node.args else node.func.value)
    for keyword in node.keywords:
        if keyword.arg == "memory_format":
            yield keyword.value, "torch.preserve_format"


def mask(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """No mask: one side of a choice everywhere, values as they are, no bound, one part of a mask alone, no negation."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield node, text(node.left)
        yield node, text(node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        yield node, text(node.operand)
    if not isinstance(node, ast.Call):
        return
    name = _name(node)
    if isinstance(node.func, ast.Attribute) and name in MASKS:
        yield node, text(node.func.value)
    elif name == "where" and len(node.args) == 3:
        # Broadcast to the shape of the choice, which else would show instead of the value.
        library = text(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        for first in (True, False):
            yield node.args[0], f"{library}.full_like({text(node.args[0])}, {first})"
    elif isinstance(node.func, ast.Attribute) and name in BOUNDS and len(node.args) == 2:
        for argument in node.args:
            yield node, text(argument)


def axes(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """Dimensions not exchanged, others exchanged, the last but one instead of the last."""
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node, text(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "transpose":
            yield node, text(node.func.value)
        if node.func.attr == "permute":
            order = [text(a) for a in node.args]
            for i in range(1, len(order) - 1):
                swapped = [*order[:i], order[i + 1], order[i], *order[i + 2 :]]
                yield node, f"{text(node.func)}({', '.join(swapped)})"
    if is_negative(node):
        yield node, repr(ast.literal_eval(node) - 1)


def flag(node: ast.expr, text: Text) -> Iterator[Replacement]:
    """True for False."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, repr(not node.value)


RULES: Mapping[Kind, Rule] = MappingProxyType(
    {
        "comparison": comparison,
        "offset": offset,
        "arithmetic": arithmetic,
        "cast": cast,
        "contiguous": contiguous,
        "mask": mask,
        "axes": axes,
        "flag": flag,
    }
)

_SYMBOLS: Mapping[type[ast.cmpop], str] = MappingProxyType(
    {
        ast.Lt: "<",
        ast.LtE: "<=",
        ast.Gt: ">",
        ast.GtE: ">=",
        ast.Eq: "==",
        ast.NotEq: "!=",
        ast.Is: "is",
        ast.IsNot: "is not",
        ast.In: "in",
        ast.NotIn: "not in",
    }
)
_OTHER_SIGN: Mapping[type[ast.operator], str] = MappingProxyType(
    {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//"}
)
_OTHERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "<": ("<=", ">="),
        "<=": ("<", ">"),
        ">": (">=", "<="),
        ">=": (">", "<"),
        "==": ("!=",),
        "!=": ("==",),
        "is": ("is not",),
        "is not": ("is",),
        "in": ("not in",),
        "not in": ("in",),
    }
)


def _name(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def is_negative(node: ast.expr) -> bool:
    """A negative number, which is one thing and not two."""
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _is_number(node.operand)


def _is_number(node: ast.expr) -> bool:
    if is_negative(node):
        return True
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)
