"""Finds module-level state: containers that are filled later, counters, registries, and functions that change them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

# Called at module level, they make something that is only good for changing.
STATEFUL = {
    "Condition",
    "ContextVar",
    "Counter",
    "Event",
    "Lock",
    "OrderedDict",
    "Queue",
    "RLock",
    "SimpleQueue",
    "WeakKeyDictionary",
    "WeakSet",
    "WeakValueDictionary",
    "count",
    "cycle",
    "defaultdict",
    "deque",
    "local",
}
CHANGES = {
    "add",
    "append",
    "appendleft",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "setdefault",
    "update",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def state(tree: ast.Module) -> Iterator[str]:
    """Every piece of state of a module, as ``line N: what``."""
    yield from (f"line {node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for body in (tree.body, *(node.body for node in classes)):
        yield from _held(body)
    shared = set(_names(tree.body))
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield from _changes(node, shared - _own(node))


def _held(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_stateful(node.value):
            yield f"line {node.lineno}: {ast.unparse(node.value)}, to be filled later"


def _is_stateful(value: ast.expr) -> bool:
    if ast.unparse(value) in {"[]", "{}", "set()", "dict()", "list()"}:
        return True
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in STATEFUL


def _names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """What a module's own statements bind to values, names that it imports included."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.ImportFrom):
            # An upper-case name is a value; all else that is imported from a module is a module, class or function.
            yield from (name for alias in node.names if (name := alias.asname or alias.name).isupper())


def _own(function: Function) -> set[str]:
    """Names that belong to a function: its arguments and what it assigns."""
    found = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    stored = (node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return found | {node.id for node in stored}


def _changes(function: Function, shared: set[str]) -> Iterator[str]:
    for node in ast.walk(function):
        target: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            target = node.func.value
        if isinstance(target, ast.Name) and target.id in shared:
            yield f"line {node.lineno}: {ast.unparse(node)} changes what the module holds"
