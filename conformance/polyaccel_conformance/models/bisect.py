"""Which operator makes a model's answers wrong: native implementations are switched on one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from polyaccel.backend import OPERATORS, STATIONS, Backend
from polyaccel.backend.backend import Implementations
from polyaccel_conformance.models.answers import Agreement, agree, ask
from polyaccel_conformance.models.engines import GREEDY, Workshop
from polyaccel_conformance.models.variations import MANY

ORDER = (
    "embedding",
    "rms_norm",
    "linear",
    "sgmv",
    "sgmv_shrink",
    "sgmv_expand",
    "rotary_embedding",
    "write_kv_cache",
    "qkv_rope_cache",
    "paged_attention",
    "row_parallel_linear",
    "row_parallel_add_norm",
    "silu_and_mul",
    "gate_up_act",
    "moe_route",
    "moe_experts",
    "select_rows",
    "column_linear",
    "sample",
)
"""In the order in which a model meets them; a station after its parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One run: which operators were native beside the mandatory ones, and how its answers compare."""

    native: tuple[str, ...]
    agreement: Agreement | None
    error: str = ""

    @property
    def wrong(self) -> str:
        """What is wrong with the answers, empty if they agree."""
        if self.error:
            return self.error
        assert self.agreement is not None
        return self.agreement.wrong or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """What :func:`bisect` found.

    Attributes:
        family: the model.
        whole: everything native, as users run it.
        base: nothing native but what is mandatory.
        alone: each other operator by itself.
        culprit: the first operator in the model's order that makes the answers disagree; ``linear`` stands for what is
            mandatory (linear, dequantize, storage, device); None if nothing does.
    """

    family: str
    whole: Suspect
    base: Suspect
    alone: tuple[Suspect, ...]
    culprit: str | None

    def lines(self) -> Iterator[str]:
        """The report, for a terminal."""
        yield f"model {self.family}: " + (f"WRONG: {self.whole.wrong}" if self.whole.wrong else "answers agree")
        rows = [("mandatory only", self.base), *((suspect.native[0], suspect) for suspect in self.alone)]
        for name, suspect in rows:
            deviation = "" if suspect.agreement is None else f"deviation {suspect.agreement.deviation:.2g}"
            yield f"  {name:24} {'WRONG' if suspect.wrong else 'ok':6} {deviation}  {suspect.wrong}".rstrip()
        if self.culprit is not None:
            yield f"first to disagree: {self.culprit}"
        elif self.whole.wrong:
            yield "each operator alone agrees: two of them disagree with each other, or the engine is wrong"


def bisect(open_backend: Callable[[], Backend], family: str, shop: Workshop) -> Bisection:
    """Run a small model with adapters on the backend, then with one native operator after the other.

    ``open_backend`` gives a new instance each time. Operators that the contract makes mandatory are native in every
    run, since nothing can stand in for them.
    """
    native = [name for name in _ordered(open_backend().operators()) if not _mandatory(name)]
    whole = _ask(open_backend, family, shop, None)
    base = _ask(open_backend, family, shop, ())
    alone = tuple(_ask(open_backend, family, shop, (name,)) for name in native)
    culprit = "linear" if base.wrong else next((s.native[0] for s in alone if s.wrong), None)
    return Bisection(family=family, whole=whole, base=base, alone=alone, culprit=culprit)


def _ask(open_backend: Callable[[], Backend], family: str, shop: Workshop, native: tuple[str, ...] | None) -> Suspect:
    expected = shop.reference(family, MANY)
    backend = open_backend()
    if native is not None:
        _limit(backend, native)
    try:
        with shop.open(family, backend, adapters=shop.adapters(family)) as llm:
            found = agree(expected, ask(llm, shop.prompts(family), MANY, GREEDY))
    except Exception as error:
        return Suspect(native=native or (), agreement=None, error=f"{type(error).__name__}: {error}")
    return Suspect(native=native or (), agreement=found)


def _limit(backend: Backend, native: tuple[str, ...]) -> None:
    """Take all other operators that are not mandatory from this instance."""
    everything = backend.operators()
    kept: Mapping[str, Implementations] = {
        name: value for name, value in everything.items() if name in native or _mandatory(name)
    }
    # The instance's own attribute hides the method; nothing else of the backend changes.
    object.__setattr__(backend, "operators", lambda: kept)


def _mandatory(name: str) -> bool:
    return name in OPERATORS and OPERATORS[name].mandatory


def _ordered(names: Mapping[str, object]) -> list[str]:
    known = [name for name in ORDER if name in names]
    return known + [name for name in names if name not in ORDER and (name in OPERATORS or name in STATIONS)]
