"""All mutants of a source file, in the order of the file."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from polyaccel_conformance.mutation.edit import Edit, Kind
from polyaccel_conformance.mutation.rules import RULES, is_negative

SILENT_KEYWORDS = ("device", "dtype", "strict")
"""Arguments whose values are left alone: where memory lies, its type as torch's default has it too, assertions."""


def edits_of(file: str, source: bytes) -> tuple[Edit, ...]:
    """Every mutant of ``source``, deterministic.

    Left out are what runs on import (constants, signatures with their defaults and annotations, decorators), what only
    words an error (``raise`` and strings), conditions of what only refuses but for their comparisons, a conversion
    beside an operand that torch promotes it to, and an edit that changes nothing.
    """
    return tuple(_File(file, source).edits())


@dataclass(slots=True)
class _Place:
    """Around an expression: its function, the lines of its statement, and whether that only leads to an error."""

    function: str
    first: int
    last: int
    guard: bool


@dataclass
class _File:
    file: str
    source: bytes
    seen: Counter[str] = field(default_factory=Counter)

    @cached_property
    def _line_starts(self) -> list[int]:
        starts = [0]
        for line in self.source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    def edits(self) -> Iterator[Edit]:
        tree = ast.parse(self.source)
        taken: set[tuple[int, int, str]] = set()
        found: list[Edit] = []
        for name, function in _functions(tree.body, ""):
            for place, expression in _expressions(name, function.body):
                for node in _walk(expression):
                    found += self._of(node, place)
        for edit in sorted(found, key=lambda e: (e.start, e.end)):
            change = (edit.start, edit.end, edit.after)
            if change in taken or _dump(edit.before) == _dump(edit.after):
                continue
            taken.add(change)
            number = self.seen[edit.key]
            self.seen[edit.key] += 1
            yield replace(edit, occurrence=number)

    def _of(self, node: ast.expr, place: _Place) -> Iterator[Edit]:
        for kind, rule in RULES.items():
            if place.guard and kind != "comparison":
                continue
            for target, after in rule(node, self._text):
                yield self._edit(kind, target, after, place)

    def _edit(self, kind: Kind, node: ast.expr, after: str, place: _Place) -> Edit:
        start, end = self._span(node)
        line = self.source[self._line_starts[node.lineno - 1] : self._line_starts[node.lineno]]
        return Edit(
            file=self.file,
            function=place.function,
            kind=kind,
            line=node.lineno,
            text=line.decode().strip(),
            first=place.first,
            last=place.last,
            start=start,
            end=end,
            before=self.source[start:end].decode(),
            after=after,
        )

    def _span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        starts = self._line_starts
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        inner = self.source[start:end].decode()
        return f"({inner})" if isinstance(node, _NEEDS_PARENTHESES) else inner


_NEEDS_PARENTHESES = (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.UnaryOp, ast.Lambda)

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, _Function]]:
    """Outermost functions and methods. What a protocol declares has no body to change."""
    for statement in body:
        if isinstance(statement, _Function):
            yield prefix + statement.name, statement
        elif isinstance(statement, ast.ClassDef):
            yield from _functions(statement.body, f"{prefix}{statement.name}.")


def _expressions(function: str, body: list[ast.stmt]) -> Iterator[tuple[_Place, ast.expr]]:
    """The expressions of all statements, but for those that only word an error."""
    for statement in body:
        if isinstance(statement, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            continue
        own, bodies = _parts(statement)
        last = max((e.end_lineno or e.lineno for e in own), default=statement.lineno)
        place = _Place(function, statement.lineno, last, _is_guard(statement))
        for expression in own:
            yield place, expression
        for inner in () if _is_guard(statement) else bodies:
            yield from _expressions(function, inner)


def _is_guard(statement: ast.stmt) -> bool:
    """``if ...: raise ...``, or the return of a sentence that says why not."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    *before, last = statement.body
    if not all(isinstance(inner, ast.Assign) for inner in before):
        return False
    if isinstance(last, ast.Return):
        value = last.value
        return isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str))
    return isinstance(last, ast.Raise) or (isinstance(last, ast.Expr) and _words_an_error(last.value))


def _parts(statement: ast.stmt) -> tuple[list[ast.expr], list[list[ast.stmt]]]:
    """A statement's own expressions and its bodies. Annotations, signatures and docstrings are none."""
    own: list[ast.expr] = []
    bodies: list[list[ast.stmt]] = []
    for name, value in ast.iter_fields(statement):
        if name in ("annotation", "args", "decorator_list", "returns"):
            continue
        if isinstance(value, ast.expr):
            own.append(value)
        elif isinstance(value, list):
            own += [item for item in value if isinstance(item, ast.expr)]
            own += [item.context_expr for item in value if isinstance(item, ast.withitem)]
            statements = [item for item in value if isinstance(item, ast.stmt)]
            bodies += [statements] if statements else []
            bodies += [item.body for item in value if isinstance(item, ast.ExceptHandler)]
    return own, bodies


def _walk(expression: ast.expr) -> Iterator[ast.expr]:
    """The expression and those inside it, but for text and what changes nothing that is computed."""
    if isinstance(expression, ast.JoinedStr) or _words_an_error(expression):
        return
    yield expression
    if is_negative(expression):
        return
    settled = _settled(expression)
    for name, value in ast.iter_fields(expression):
        if isinstance(expression, ast.Lambda) and name == "args":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr) and child not in settled:
                # Of two operands torch takes the wider type for both.
                promoted = isinstance(expression, ast.BinOp) and not isinstance(expression.op, ast.MatMult)
                yield from _walk(_unconverted(child) if promoted else child)
            elif isinstance(child, ast.keyword) and child.arg not in SILENT_KEYWORDS:
                yield from _walk(child.value)
            elif isinstance(child, ast.comprehension):
                for part in (child.iter, *child.ifs):
                    yield from _walk(part)


def _unconverted(expression: ast.expr) -> ast.expr:
    """``x`` for ``x.float()``."""
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        return expression.func.value if expression.func.attr == "float" else expression
    return expression


def _settled(expression: ast.expr) -> list[ast.expr]:
    """Numbers that another rule changes already, or whose change no call survives, or that say nothing: those compared
    with, the order of dimensions, an index into a shape, ``or 0``."""
    parts: list[ast.expr] = []
    if isinstance(expression, ast.Compare):
        parts = [expression.left, *expression.comparators]
    elif isinstance(expression, ast.BoolOp):
        parts = expression.values
    elif isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        parts = expression.args if expression.func.attr in ("permute", "transpose") else []
    elif isinstance(expression, ast.Subscript) and isinstance(expression.value, ast.Attribute):
        parts = [expression.slice] if expression.value.attr == "shape" else []
    return [part for part in parts if isinstance(part, ast.Constant) or is_negative(part)]


def _words_an_error(expression: ast.expr) -> bool:
    if not isinstance(expression, ast.Call):
        return False
    function = expression.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name.endswith(("Error", "_refuse")) or name == "describe"


def _dump(text: str) -> str:
    return ast.dump(ast.parse(f"_({text})", mode="eval"))
