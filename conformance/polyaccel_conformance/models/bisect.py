"""Which operator makes a model's answers wrong: native implementations are switched on one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from polyaccel.backend import OPERATORS, Backend
from polyaccel_conformance.case import Case
from polyaccel_conformance.errors import ConformanceError, UsageError
from polyaccel_conformance.models.answers import Agreement, agree, ask
from polyaccel_conformance.models.engines import GREEDY, Workshop
from polyaccel_conformance.models.families import FAMILIES
from polyaccel_conformance.models.layers import NAME
from polyaccel_conformance.models.variations import MANY
from polyaccel_conformance.multi.ranks import RankPool
from polyaccel_conformance.subject import Subject, limit
from polyaccel_conformance.workers.process import ForkServer

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
    "all_reduce",
    "row_parallel_linear",
    "row_parallel_add_norm",
    "silu_and_mul",
    "gate_up_act",
    "moe_route",
    "moe_experts",
    "select_rows",
    "all_gather",
    "column_linear",
    "sample",
)
"""In the order in which a model meets them; a station after its parts."""
ENDS = ("embedding", "select_rows", "all_gather", "sample")
"""What is called before the first layer and after the last."""
COMMUNICATOR = "communicator"
PHASES = ("mixed", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One run: which operators were native beside the mandatory ones, how its answers compare, and how it ended where
    there are none."""

    native: tuple[str, ...]
    agreement: Agreement | None
    error: str = ""

    @property
    def wrong(self) -> str:
        """What is wrong with it, empty if nothing is."""
        return self.error if self.agreement is None else self.agreement.wrong or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """What :func:`bisect` found.

    Attributes:
        family: the model; ``ranks``: on how many it ran.
        whole: everything native, as users run it.
        base: nothing native but what is mandatory.
        alone: each other operator by itself.
        culprit: the first operator in the model's order that makes the answers disagree; ``linear`` stands for what is
            mandatory (linear, dequantize, storage, device), ``communicator`` for what only several ranks need; None if
            nothing does.
    """

    family: str
    whole: Suspect
    base: Suspect
    alone: tuple[Suspect, ...]
    culprit: str | None
    ranks: int = 1

    def lines(self) -> Iterator[str]:
        """The report, for a terminal."""
        where = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        yield f"model {self.family}{where}: " + (f"WRONG: {self.whole.wrong}" if self.whole.wrong else "answers agree")
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

    def run(native: tuple[str, ...] | None) -> Suspect:
        return _ask(open_backend, family, shop, native)

    whole, base, alone = _series(run, ORDER, open_backend().operators())
    culprit = "linear" if base.wrong else _first(alone)
    return Bisection(family=family, whole=whole, base=base, alone=alone, culprit=culprit)


def bisect_ranks(subject: Subject, family: str, ranks: int, server: ForkServer | None = None) -> Bisection:
    """The same for several ranks: every layer of the model is fed the reference's input on all of them.

    Raises:
        UsageError: more ranks than the backend has devices, or the model heads.
    """
    backend = subject.open()
    devices, heads = list(backend.devices()), FAMILIES[family].heads
    if devices[0].torch_device.type != "cpu" and len(devices) < ranks:
        raise UsageError(f"--devices {ranks}: {subject.label} has {len(devices)} devices")
    if ranks > heads:
        raise UsageError(f"--devices {ranks}: the model {family} has {heads} query heads, {heads} ranks at most")
    own = server if server is not None else ForkServer()

    def run(native: tuple[str, ...] | None) -> Suspect:
        limited = subject if native is None else replace(subject, native=",".join(native))
        return Suspect(native=native or (), agreement=None, error=_layers(limited, family, ranks, own))

    try:
        whole, base, alone = _series(run, [name for name in ORDER if name not in ENDS], backend.operators())
        culprit = _first(alone)
        if base.wrong:
            with Workshop() as shop:
                wrong = _ask(replace(subject, native="").open, family, shop, None).wrong
            culprit = "linear" if wrong else COMMUNICATOR
    finally:
        if server is None:
            own.close()
    return Bisection(family=family, whole=whole, base=base, alone=alone, culprit=culprit, ranks=ranks)


def _series(
    run: Callable[[tuple[str, ...] | None], Suspect], order: Sequence[str], operators: Mapping[str, object]
) -> tuple[Suspect, Suspect, tuple[Suspect, ...]]:
    """Everything native, nothing but what is mandatory, and each other operator alone."""
    native = [name for name in order if name in operators and not (name in OPERATORS and OPERATORS[name].mandatory)]
    return run(None), run(()), tuple(run((name,)) for name in native)


def _first(suspects: Sequence[Suspect]) -> str | None:
    return next((suspect.native[0] for suspect in suspects if suspect.wrong), None)


def _ask(open_backend: Callable[[], Backend], family: str, shop: Workshop, native: tuple[str, ...] | None) -> Suspect:
    expected = shop.reference(family, MANY)
    backend = open_backend()
    if native is not None:
        limit(backend, native)
    try:
        with shop.open(family, backend, adapters=shop.adapters(family)) as llm:
            found = agree(expected, ask(llm, shop.prompts(family), MANY, GREEDY))
    except Exception as error:
        return Suspect(native=native or (), agreement=None, error=f"{type(error).__name__}: {error}")
    return Suspect(native=native or (), agreement=found)


def _layers(subject: Subject, family: str, ranks: int, server: ForkServer) -> str:
    """What is wrong with the layers on these ranks, empty if nothing is."""
    with RankPool(subject, ranks, checks=(NAME,), server=server) as pool:
        for phase in PHASES:
            axes = {"attributes.family": family, "structure.phase": phase, "structure.adapters": "many"}
            try:
                result = pool.run(Case.of(NAME, {**axes, "ranks": ranks}))
            except ConformanceError as error:
                return str(error)
            if result.failures:
                return result.failures[0].message
    return ""
