"""How an operator of CANN is described: its C signature, the document behind its rules, what it computes."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from .errors import RuleError
from .soc import CannVersion

Compute = Callable[[], None]
"""What the device does. It may run more than once (a captured graph is replayed), each time on the bytes found then."""

MAX_WORKSPACE = "GetMaxWorkspaceSize"
"""The end of the names of functions that only say how large a workspace may become."""


@dataclass(frozen=True, slots=True)
class Launch:
    """An operator with a second host-side check: what CANN finds only when phase 2 is called.

    A ``Refused`` raised by ``check`` is the return code of the aclnn call itself; torch_npu meets it on its queue
    thread, after the operator's Python call has returned (TASK_QUEUE_ENABLE 1 or 2).
    """

    check: Callable[[], None]
    compute: Compute


class Later:
    """Stands for a host list in the first part of a check that is made in two: to read it is a defect of the rule."""

    def __bool__(self) -> bool:
        raise TypeError("this list is given to the check's second part")

    def __repr__(self) -> str:
        return "a list that is read later"


LATER = Later()
ByLists = Callable[..., Compute]
"""The second part: gets the call's host lists (None for a null pointer), checks what reads them, returns what runs."""

Function = Callable[..., Compute | Launch | ByLists]

_KINDS: dict[str, tuple[Any, str | None]] = {
    "tensor": (ctypes.c_void_p, "tensor"),
    "tensors": (ctypes.c_void_p, "tensors"),
    "ints": (ctypes.c_void_p, "ints"),
    "bools": (ctypes.c_void_p, "bools"),
    "floats": (ctypes.c_void_p, "floats"),
    "scalar": (ctypes.c_void_p, "scalar"),
    "number": (ctypes.c_void_p, "number"),
    "dtype": (ctypes.c_int32, "dtype"),
    "scalars": (ctypes.c_void_p, "scalars"),
    "string": (ctypes.c_char_p, "string"),
    "int64": (ctypes.c_int64, None),
    "int32": (ctypes.c_int32, None),
    "int8": (ctypes.c_int8, None),
    "uint64": (ctypes.c_uint64, None),
    "uint32": (ctypes.c_uint32, None),
    "bool": (ctypes.c_bool, None),
    "double": (ctypes.c_double, None),
    "float": (ctypes.c_float, None),
    "pointer": (ctypes.c_void_p, None),
    "stream": (ctypes.c_void_p, None),
}
"""Words of a signature: the C type, and which method of ``Decoder`` reads it (None: handed over as it is)."""


@dataclass(frozen=True)
class Rule:
    """One exported function of a simulated library.

    Attributes:
        name: ``aclnnRmsNorm`` (without ``GetWorkspaceSize``) or ``HcclAllReduce``.
        signature: the words of ``_KINDS`` in the order of the C arguments; for aclnn without the trailing workspace
            size and executor.
        source: the document whose constraints the function enforces.
        since, until: first CANN version that exports it, and the first that no longer does.
        library: ``opapi`` or ``hccl``.
        also: further names of the same function.
        wants_simulator: whether the function takes the keyword ``simulator``.
        pure: whether the function's answer follows from its arguments alone, so that a call equal to one that it has
            accepted need not be checked again.
        lists_apart: whether the function gets ``LATER`` for each word ``ints`` that is no null pointer, and returns a
            ``ByLists``. Of a call that differs from an accepted one in these lists alone only they are checked.
    """

    name: str
    signature: tuple[str, ...]
    function: Callable[..., Any]
    source: str
    since: CannVersion
    until: CannVersion | None = None
    library: str = "opapi"
    wants_simulator: bool = False
    pure: bool = False
    lists_apart: bool = False
    also: tuple[Rule, ...] = field(default=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def exported(self, cann: CannVersion) -> bool:
        return self.since <= cann and (self.until is None or cann < self.until)

    @property
    def asks_size(self) -> bool:
        """Whether it only says how large a workspace may become, and launches nothing."""
        return self.name.endswith(MAX_WORKSPACE)

    @property
    def c_types(self) -> list[Any]:
        return [_KINDS[word][0] for word in self.signature]

    @property
    def readers(self) -> list[str | None]:
        return [_KINDS[word][1] for word in self.signature]


def parse(name: str, signature: str) -> tuple[str, ...]:
    """The words of a signature; ``3*tensor`` stands for three.

    Raises:
        RuleError: a word is unknown; the message names ``name``.
    """
    words: list[str] = []
    for part in signature.split():
        times, _, word = part.rpartition("*")
        if word not in _KINDS or not (times or "1").isdigit():
            raise RuleError(f"{name}: {part!r} in the signature; known are {', '.join(_KINDS)}")
        words += [word] * int(times or 1)
    return tuple(words)


def _rule(library: str, name: str, signature: str, source: str, since: str, until: str | None) -> Callable[[Any], Rule]:
    words = parse(name, signature)
    if not source:
        raise RuleError(f"{name}: a rule cites the document it comes from")
    first, end = CannVersion(since), CannVersion(until) if until else None
    assert first.key

    def decorate(function: Any) -> Rule:
        earlier = function if isinstance(function, Rule) else None
        plain = earlier.function if earlier else function
        wants = "simulator" in inspect.signature(plain).parameters
        one = Rule(name, words, plain, source, first, end, library, wants)
        return replace(one, also=(replace(earlier, also=()), *earlier.also)) if earlier else one

    return decorate


def aclnn(
    name: str, signature: str, *, source: str, since: str = "8.0.RC1", until: str | None = None
) -> Callable[[Any], Rule]:
    """Describes an aclnn operator. Decorates its phase 1.

    The function receives the decoded arguments by position (``AclTensor`` or None for a null pointer, numbers, ``str``,
    tuples, ``AclScalar``), checks what the document demands, raises ``Refused``, and returns the closure that computes,
    or a ``Launch`` if CANN checks more when phase 2 is called. With a keyword ``simulator`` it also
    gets the ``Simulator``.
    Stacked decorators give one function several names and signatures.

    Args:
        name: without ``GetWorkspaceSize``.
        signature: one word an argument, in C's order: tensor tensors ints bools floats scalar number scalars string
            dtype int64 int32 int8 uint64 uint32 bool double float pointer (``number`` is a scalar as Python's number,
            ``2*tensor`` two tensors). The trailing workspace size and executor are left out.
        source: the document.
        since, until: CANN versions that export it; op-plugin chooses its path by the names that exist.
    """
    return _rule("opapi", name, signature, source, since, until)


def hccl(
    name: str, signature: str, *, source: str, since: str = "8.0.RC1", until: str | None = None
) -> Callable[[Any], Rule]:
    """Describes a function of HCCL. The decorated function gets raw values (pointers as int or None, numbers, bytes).

    It returns None or 0 for success, another number as the result, or a closure: that is queued on the stream of the
    argument ``stream`` (the signature must name one) and the call returns success at once.
    """
    return _rule("hccl", name, signature, source, since, until)


def collect(package: str) -> list[Rule]:
    """All rules in a package's modules, by name: module-level ones, and those in a sequence called ``RULES``.

    The package may be absent; then there are none.

    Raises:
        RuleError: two rules have one name at a common CANN version.
    """
    try:
        root = importlib.import_module(package)
    except ModuleNotFoundError as problem:
        if problem.name == package:
            return []
        raise
    found: dict[int, Rule] = {}
    for module in _modules(root):
        for value in vars(module).values():
            if isinstance(value, Rule):
                found.setdefault(id(value), value)
        for value in getattr(module, "RULES", ()):
            found.setdefault(id(value), value)
    rules = [one for top in found.values() for one in (top, *top.also)]
    return sorted(rules, key=lambda rule: (rule.name, rule.since.key))


def exported(rules: Sequence[Rule], cann: CannVersion) -> dict[str, Rule]:
    """The functions of one CANN version.

    Raises:
        RuleError: two rules have one name.
    """
    out: dict[str, Rule] = {}
    for rule in rules:
        if not rule.exported(cann):
            continue
        if rule.name in out and out[rule.name] is not rule:
            raise RuleError(f"{rule.name} is described twice for CANN {cann}")
        out[rule.name] = rule
    return out


def _modules(root: ModuleType) -> Iterator[ModuleType]:
    yield root
    for info in pkgutil.walk_packages(getattr(root, "__path__", []), root.__name__ + "."):
        yield importlib.import_module(info.name)
