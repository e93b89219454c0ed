"""Ways of running one model that must not change its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from unittest import mock

from polyaccel.backend import Backend
from polyaccel_conformance.models.answers import Agreement, Answer, Mix, agree, ask, ask_alone, greedy, seeded
from polyaccel_conformance.models.engines import GREEDY, LENGTHS, Workshop

Open = Callable[[], Backend | str]
BASE: tuple[Mix, ...] = (None,) * len(LENGTHS)
ONE: tuple[Mix, ...] = ("everything",) * len(LENGTHS)
MANY: tuple[Mix, ...] = (None, "everything", "odd", {"one": 0.5, "odd": -0.5}, None, "everything")


class NotExercised(Exception):
    """The subject cannot do what a variation needs; says why."""


Variation = Callable[[Workshop, str, Open], Agreement]


def tokens(shop: Workshop, family: str, subject: Open) -> Agreement:
    """All prompts in one batch, everything switched on, against the reference."""
    with shop.open(family, subject(), graphs=True) as llm:
        return agree(shop.reference(family, BASE), ask(llm, shop.prompts(family), BASE, GREEDY))


def adapters(shop: Workshop, family: str, subject: Open) -> Agreement:
    """The same with one adapter on all requests, then several in one batch, base rows and a weighted mix among them;
    then once more after all have been unloaded and loaded again, in another order."""
    with shop.open(family, subject(), adapters=shop.adapters(family)) as llm:
        found = [
            agree(shop.reference(family, mixes), ask(llm, shop.prompts(family), mixes, GREEDY)) for mixes in (ONE, MANY)
        ]
        folders = shop.adapters(family)
        for name in folders:
            llm.adapters.unload(name)
        for name in reversed(folders):
            llm.adapters.load(name, folders[name])
        found.append(agree(shop.reference(family, MANY), ask(llm, shop.prompts(family), MANY, GREEDY)))
    return _worst(found)


def crowd(shop: Workshop, family: str, subject: Open) -> Agreement:
    """Alone and in a batch with others, greedy and with seeds."""
    prompts = shop.prompts(family)
    params = [seeded(12, seed=7 * i) if i % 2 else GREEDY for i in range(len(prompts))]
    with shop.open(family, subject(), adapters=shop.adapters(family), prefix_caching=False) as llm:
        alone = ask_alone(llm, prompts, MANY, params)
        # What is drawn is not the best token, so that margins say nothing about it.
        return agree(alone, ask(llm, prompts, MANY, params), drawn=[i % 2 == 1 for i in range(len(prompts))])


def overlap(shop: Workshop, family: str, subject: Open) -> Agreement:
    """The next step prepared while one runs, and not; answers end early and others take their places."""
    prompts = [*shop.prompts(family), *shop.prompts(family)]
    mixes = [*MANY, *reversed(MANY)]
    stop = [answer.tokens[len(answer.tokens) // 2] for answer in shop.reference(family, MANY)]
    found = []
    for switched in (False, True):
        options = {"overlap": switched, "max_num_seqs": 3, "adapters": shop.adapters(family)}
        with shop.open(family, subject(), **options) as llm:
            found.append(ask(llm, prompts, mixes, greedy(12, stop)))
    return agree(found[0], found[1])


def chunks(shop: Workshop, family: str, subject: Open) -> Agreement:
    """Prompts prefilled whole, and in chunks mixed with the decode of others."""
    found = []
    for budget in (512, 11):
        with shop.open(family, subject(), max_batched_tokens=budget, adapters=shop.adapters(family)) as llm:
            found.append(ask(llm, shop.prompts(family), MANY, GREEDY))
    return agree(found[0], found[1])


def prefix_cache(shop: Workshop, family: str, subject: Open) -> Agreement:
    """Prompts whose beginning is cached, under the same and under another adapter."""
    answers: dict[str, list[Answer]] = {}
    whole = {"adapters": shop.adapters(family), "prefix_caching": False, "max_batched_tokens": 512}
    with shop.open(family, subject(), **whole) as llm:
        size = llm.engine.executor.capacity.kv_block_size
        prompts = shop.prompts(family, size)
        for name, mixes in (("base", BASE), ("one", ONE)):
            answers[name] = ask(llm, prompts, mixes, GREEDY)
    found: list[Agreement] = []
    with shop.open(family, subject(), adapters=shop.adapters(family), max_batched_tokens=512) as llm:
        for name, mixes in (("base", BASE), ("base", BASE), ("one", ONE), ("base", BASE), ("one", ONE)):
            found.append(agree(answers[name], ask(llm, prompts, mixes, GREEDY)))
        # After a reload under the same name the old prefixes belong to another adapter.
        llm.adapters.unload("everything")
        llm.adapters.load("everything", shop.adapters(family)["odd"])
        renamed = ask(llm, prompts, ONE, GREEDY)
        hits = llm.engine.loop.stats().prefix_hits
    odd: list[Mix] = ["odd"] * len(prompts)
    found.append(agree(shop.reference(family, odd, size), renamed))
    worst = _worst(found)
    if worst.wrong is None and not hits:
        return Agreement(wrong="no prefix was found in the cache", deviation=0.0, decided=0.0)
    return worst


def preemption(shop: Workshop, family: str, subject: Open) -> Agreement:
    """A KV cache so small that requests are put back and recomputed."""
    whole = {"adapters": shop.adapters(family), "prefix_caching": False, "max_batched_tokens": 512}
    with shop.open(family, subject(), **whole) as llm:
        size = llm.engine.executor.capacity.kv_block_size
        # All of a length that fills its blocks, so that each needs another one while it decodes.
        prompts = [prompt[: size - 2] for prompt in shop.prompts(family, size)]
        plenty = ask(llm, prompts, MANY, GREEDY)
        config = llm.engine.model_config
        per_block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size * 4
    few = {"kv_cache_bytes": 5 * per_block, "max_model_len": size + 12, "max_batched_tokens": 512}
    with shop.open(family, subject(), adapters=shop.adapters(family), prefix_caching=False, **few) as llm:
        found = agree(plenty, ask(llm, prompts, MANY, GREEDY))
        if found.wrong is None and not llm.engine.loop.stats().preemptions:
            return Agreement(wrong="nothing was preempted", deviation=0.0, decided=0.0)
        return found


def graphs(shop: Workshop, family: str, subject: Open) -> Agreement:
    """Decode replayed from graphs, and run eagerly."""
    backend = subject()
    refusals = [] if isinstance(backend, str) else backend.graph_refusals()
    if refusals:
        raise NotExercised("; ".join(refusals))
    found = []
    with ExitStack() as stack:
        for switched, chosen in ((False, subject()), (True, backend)):
            llm = stack.enter_context(
                shop.open(family, chosen, graphs=switched, adapters=shop.adapters(family), executor="inline")
            )
            # Other adapters on the same rows, then none: what was captured must not stay.
            for mixes in (MANY, MANY[::-1], BASE):
                found.append(ask(llm, shop.prompts(family), mixes, GREEDY))
            if switched and not _replays(llm.explain().to_dict()):
                return Agreement(wrong="no graph was replayed", deviation=0.0, decided=0.0)
    return _worst([agree(eager, replayed) for eager, replayed in zip(found[:3], found[3:], strict=True)])


def _replays(explained: object) -> int:
    if isinstance(explained, dict):
        own = explained.get("replays")
        return (own if isinstance(own, int) else 0) + sum(_replays(value) for value in explained.values())
    if isinstance(explained, list):
        return sum(_replays(value) for value in explained)
    return 0


def _worst(found: list[Agreement]) -> Agreement:
    return next((f for f in found if f.wrong is not None), max(found, key=lambda f: f.deviation))


VARIATIONS: Mapping[str, Variation] = MappingProxyType(
    {
        "model.tokens": tokens,
        "model.adapters": adapters,
        "model.crowd": crowd,
        "model.overlap": overlap,
        "model.chunks": chunks,
        "model.prefix_cache": prefix_cache,
        "model.preemption": preemption,
        "model.graphs": graphs,
    }
)


@contextmanager
def wrong_adapter() -> Iterator[None]:
    """Engines opened inside load every adapter from the folder of the first: no right answer can come out."""

    def adapters(self: Workshop, family: str) -> dict[str, Path]:
        folders = original(self, family)
        return dict.fromkeys(folders, next(iter(folders.values())))

    original = Workshop.adapters
    with mock.patch.object(Workshop, "adapters", adapters):
        yield
