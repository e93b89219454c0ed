"""Bugs of the engine: patched parts of it, found by whole-model questions. The backend is the host as it is."""

from __future__ import annotations

from collections.abc import Callable

from polyaccel.backend import Backend
from polyaccel_conformance.models.questions import QUESTIONS
from polyaccel_conformance.mutants.mutant import Host, Mutant

OF_RANKS = ("model.ranks", "model.adapters")
WHOLE_MODEL = (*(q.operator for q in QUESTIONS if q.operator not in OF_RANKS[:1]), "cache.identity")
"""Questions that one rank answers."""
CAPTURED = ("model.tokens", "model.graphs", "model.float32")
"""Questions that are asked with graphs switched on."""


def _plant(name: str) -> Callable[[Backend], Backend]:
    def apply(inner: Backend) -> Backend:
        from polyaccel_conformance.models.planted import plant

        plant(name)
        return inner

    return apply


def _engine(
    name: str,
    what: str,
    check: str,
    *,
    operators: tuple[str, ...] = WHOLE_MODEL,
    host: Host = "cpu",
    devices: int = 1,
) -> Mutant:
    return Mutant(
        name=name,
        what=what,
        operators=operators,
        check=check,
        apply=_plant(name),
        host=host,
        devices=devices,
        engine=True,
    )


ENGINE: tuple[Mutant, ...] = (
    _engine(
        "engine.uncached_first_row",
        "Among others a prompt that is not cached goes on from its first row.",
        "model.tokens",
    ),
    _engine("engine.first_token_lost", "Without adapters a prompt begins with token 0.", "model.tokens"),
    _engine("engine.fifth_load", "From the fifth on, adapters that are loaded do nothing.", "model.adapters"),
    _engine("engine.mix_sign_lost", "Negative weights of a mix count as positive.", "model.adapters"),
    _engine("engine.scaled_by_padded_rank", "The scale is alpha over a rank padded to 16.", "model.adapters"),
    _engine("engine.uniform_by_row", "Random numbers follow the row, not the request.", "model.crowd"),
    _engine("engine.crowd_context", "The last of several sequences misses its newest token.", "model.crowd"),
    _engine("engine.freed_early", "A slot is free while a submitted step still names it.", "model.overlap"),
    _engine("engine.short_chunk_positions", "Positions of a short chunk start again at 0.", "model.chunks"),
    _engine(
        "engine.third_use_of_a_block", "Blocks that are found again are all the first of them.", "model.prefix_cache"
    ),
    _engine("engine.preempted_token_lost", "A preempted request loses its last token.", "model.preemption"),
    _engine(
        "engine.graph_keeps_adapters",
        "A graph goes on with the adapters of its capture.",
        "model.graphs",
        operators=CAPTURED,
        host="simulated",
    ),
    _engine(
        "engine.graph_base_rows",
        "Rows without adapters get those that as many rows had last.",
        "model.graphs",
        operators=CAPTURED,
        host="simulated",
    ),
    _engine("engine.short_logits", "Logits keep 12 bits.", "model.float32"),
    _engine(
        "engine.layer_rope_shifted",
        "In one layer every position is one ahead.",
        "model.layers",
        operators=("model.layers", *WHOLE_MODEL),
    ),
    _engine(
        "engine.rank_reads_other_adapter",
        "The last rank reads the first adapter for all.",
        "model.ranks",
        operators=OF_RANKS,
        devices=4,
    ),
    _engine("engine.merge_keeps_cache", "A merge leaves old keys and values in the prefix cache.", "cache.identity"),
    _engine("engine.prefix_by_name", "The prefix cache knows adapters by their names.", "cache.identity"),
    _engine(
        "engine.choice_ignored",
        "All choices of a request draw the same numbers.",
        "sample.generator",
        operators=("sample.generator", "model.crowd"),
    ),
    _engine(
        "engine.share_scaled",
        "A share of a module's input scales the adapter once more.",
        "lora.tp_delta_equal",
        operators=("sgmv", "model.adapters"),
        devices=2,
    ),
)
