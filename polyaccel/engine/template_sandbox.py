"""Jinja's immutable sandbox, made finite.

The sandbox keeps a template away from Python's internals but lets it loop and grow without end. Here every loop turn,
call and filter is a step with a limit, whatever is stored, joined or printed has a size limit, and there is a deadline.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 500_000
MAX_SIZE = 16 << 20
MAX_HANDLED = 256 << 20
MAX_SECONDS = 10.0
_MAX_BITS = 4096
# What an element of a container counts as, in characters: looking at it costs time even if it holds nothing.
_ELEMENT = 16
_MAX_WIDTH = 10_000
_WIDE_FORMAT = re.compile(r"\d{5,}|\*")
_WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "tojson")
_FORBIDDEN = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)


class LimitExceeded(Exception):
    """A template took more steps, space or time than a prompt can need."""


class TemplateRefusal(Exception):
    """The template called ``raise_exception``; the message is its own."""


class Budget:
    """Steps and seconds that one rendering has left."""

    __slots__ = ("_deadline", "_handled", "_printed", "_steps")

    def __init__(self) -> None:
        self._steps = 0
        self._handled = 0
        self._printed = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        before = self._steps
        self._steps += count
        if self._steps > MAX_STEPS:
            raise LimitExceeded(f"more than {MAX_STEPS} steps")
        if before >> 8 != self._steps >> 8 and time.monotonic() > self._deadline:
            raise LimitExceeded(f"more than {MAX_SECONDS:g} seconds")

    def print(self, size: int) -> None:
        self._printed += size
        check_size(self._printed)

    def measure(self, value: object) -> int:
        """The size of ``value`` in characters, containers within containers included."""
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, (str, bytes)):
                size += len(item)
            elif isinstance(item, (list, tuple, Mapping)):
                size += _ELEMENT * len(item)
                check_size(size)
                stack.extend(item)
                if isinstance(item, Mapping):
                    stack.extend(item.values())
            check_size(size)
        self._handled += size
        if self._handled > MAX_HANDLED:
            raise LimitExceeded(f"more than {MAX_HANDLED} characters handled in all")
        return size


class _BudgetContext(Context):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.budget = Budget()


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of Hugging Face chat templates: their options, globals and filters, with limits."""

    context_class = _BudgetContext
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationBlock], cache_size=0
        )
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _limited_filter("tojson", _to_json)
        self.filters.update({"_counted": _counted, "_stored": _stored, "_printed": _printed_value, "_joined": _joined})
        del self.globals["lipsum"]
        self.globals["dict"] = dict
        self.globals["namespace"] = _SafeNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _generate(self, source: nodes.Template, *args: object, **kwargs: object) -> str:
        forbidden = next(source.find_all(_FORBIDDEN), None)
        if forbidden is not None:
            raise SecurityError(f"line {forbidden.lineno}: {type(forbidden).__name__.lower()} is not allowed here")
        return super()._generate(_Limiter().visit(source), *args, **kwargs)  # type: ignore[arg-type]

    def call(self, context: Context, function: Callable[..., object], /, *args: object, **kwargs: object) -> object:
        budget = _budget(context)
        budget.step()
        # NOTE: the sandbox hands out its own wrapper of str.format.
        method = getattr(function, "__wrapped__", function)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            _check_text_call(budget, name, owner, args, kwargs)
        elif isinstance(function, LoopContext) and args:
            args = (_count(budget, args[0]), *args[1:])
        result = super().call(context, function, *args, **kwargs)
        budget.measure(result)
        return result

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        budget = _budget(context)
        budget.step()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            budget.measure((left, right))
        result = super().call_binop(context, operator, left, right)
        budget.measure(result)
        return result


class _Limiter(NodeTransformer):
    """Puts a limit around whatever can loop, keep or print."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _through("_counted", node.iter)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        node.node = _through("_stored", node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            _through(
                "_printed", nodes.Const(item.data, lineno=item.lineno) if isinstance(item, nodes.TemplateData) else item
            )
            for item in node.nodes
        ]
        return node


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the package's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: object, **kwargs: object) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_attribute(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def check_size(size: int) -> None:
    """Raises LimitExceeded for a size that no prompt needs."""
    if size > MAX_SIZE:
        raise LimitExceeded(f"a value of more than {MAX_SIZE} characters")


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    # NOTE: the parser makes expressions of all these; only the package's annotations say less.
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _budget(context: Context) -> Budget:
    if not isinstance(context, _BudgetContext):
        raise LimitExceeded("a context without limits")
    return context.budget


def _count(budget: Budget, values: object) -> Iterator[object]:
    for value in values:  # type: ignore[attr-defined]
        budget.step()
        yield value


@pass_context
def _counted(context: Context, values: Iterable[object]) -> Iterator[object]:
    # NOTE: iter() here and not in the generator, so that a loop over nothing fails where it is written.
    return _count(_budget(context), iter(values))


@pass_context
def _stored(context: Context, value: object) -> object:
    budget = _budget(context)
    budget.step()
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise LimitExceeded("a number too large")
    budget.measure(value)
    return value


@pass_context
def _printed_value(context: Context, value: object) -> object:
    budget = _budget(context)
    budget.step()
    budget.print(budget.measure(value))
    return value


@pass_context
def _joined(context: Context, values: list[object]) -> str:
    budget = _budget(context)
    budget.step()
    budget.measure(values)
    return "".join([str(value) for value in values])


def _limited_filter(name: str, function: Callable[..., object]) -> Callable[..., object]:
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    # NOTE: with the context as an argument a filter is also never evaluated while compiling, where nothing limits it.
    @pass_context
    def limited(context: Context, *args: object, **kwargs: object) -> object:
        budget = _budget(context)
        budget.step()
        for value in (*args, *kwargs.values()):
            budget.measure(value)
        if args and isinstance(args[0], str):
            _check_text_call(budget, name, args[0], args[1:], kwargs)
        elif name in _WIDENING:
            _check_widths(args[1:], kwargs)
        if name == "join" and args and isinstance(args[0], (list, tuple)):
            separator = kwargs.get("d", args[1] if len(args) > 1 else "")
            check_size(len(args[0]) * len(str(separator)))
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        result = function(*((first[wanted],) if wanted in first else ()), *args, **kwargs)
        budget.measure(result)
        return result

    return limited


def _check_text_call(
    budget: Budget, name: str, text: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> None:
    """Refuse what would make a text much longer, before it is made."""
    if name in _WIDENING:
        _check_widths(args, kwargs)
        lines = text.count("\n") + text.count("\t") + 1
        widest = max((_width(value) for value in (*args, *kwargs.values())), default=8)
        check_size(len(text) + lines * widest)
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        check_size(len(text) + (text.count(args[0]) + 1) * len(args[1]))
    elif name == "join" and args:
        check_size(budget.measure(args[0]) + (len(args[0]) * len(text) if isinstance(args[0], (list, tuple)) else 0))
    elif name in ("format", "format_map"):
        _check_format(text)
        check_size(len(text) + sum(budget.measure(value) for value in (*args, *kwargs.values())))


def _width(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return value if isinstance(value, int) else 0


def _check_widths(args: Iterable[object], kwargs: Mapping[str, object]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in (*args, *kwargs.values())):
        raise LimitExceeded(f"a width of more than {_MAX_WIDTH}")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise LimitExceeded("a format with a width of five digits or '*'")


def _check_power(left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int) and abs(left) > 1 and left.bit_length() * right > _MAX_BITS:
        raise LimitExceeded("a number too large")


def _check_product(left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_BITS:
            raise LimitExceeded("a number too large")
        return
    for items, times in ((left, right), (right, left)):
        if isinstance(items, (str, list, tuple)) and isinstance(times, int):
            check_size(len(items) * times)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 256 or re.search(r"\d{3,}", format):
        raise LimitExceeded("a date format too long")
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
