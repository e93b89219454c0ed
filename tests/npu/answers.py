"""SmolLM2's answers on a backend, greedy, with each token's margin over the next best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyaccel import LLM, SamplingParams
from polyaccel.engine.outputs import TokenLogprob

QUESTIONS = ("What is the capital of France?", "Name three colours of a rainbow.", "How do I boil an egg?")
TOKENS = 8
MARGIN = 0.25
"""Nats: tokens that lead by less may fall either way when products are rounded to 16 bits."""
ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"


@dataclass(frozen=True)
class Answers:
    """By question, for one adapter: token ids, and by how much each token led."""

    ids: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    texts: tuple[str, ...]


def ask(
    model: Path,
    backend: str,
    dtype: str,
    *,
    ranks: int = 1,
    adapters: Sequence[str | None] = (None,),
    graphs: bool = False,
    captures: list[tuple[int, int]] | None = None,
    **options: object,
) -> Mapping[str | None, Answers]:
    """Answers by adapter, None for the base. ``captures`` gets how many graphs the first rank captured and replayed
    after each adapter."""
    loaded = {name: ADAPTERS / name for name in adapters if name is not None}
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=2)
    found: dict[str | None, Answers] = {}
    with LLM(
        model,
        backend=backend,
        dtype=dtype,  # type: ignore[arg-type]
        tensor_parallel_size=ranks,
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_bytes=64 << 20,
        adapters=loaded or None,
        graphs=graphs,
        **options,  # type: ignore[arg-type]
    ) as llm:
        for name in adapters:
            chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
            done = [llm.chat(chat, params, adapter=name)[0] for chat in chats]
            found[name] = Answers(
                ids=tuple(tuple(one.token_ids) for one in done),
                margins=tuple(tuple(_margins(one.logprobs)) for one in done),
                texts=tuple(one.text for one in done),
            )
            if captures is not None:
                counts = llm.explain().ranks[0]["graphs"]
                assert isinstance(counts, dict)
                captures.append((int(counts["captures"]), int(counts["replays"])))
    return found


def _margins(logprobs: Sequence[TokenLogprob] | None) -> list[float]:
    """How far each sampled id led, which is the best one."""
    return [token.top[0][1] - token.top[1][1] for token in logprobs or ()]


def assert_same(found: Answers, expected: Answers, what: str) -> None:
    """Equal tokens up to the first one that did not lead by :data:`MARGIN`."""
    compared = 0
    for ids, wanted, margins in zip(found.ids, expected.ids, expected.margins, strict=True):
        sure = next((i for i, margin in enumerate(margins) if margin < MARGIN), len(wanted))
        assert ids[:sure] == wanted[:sure], f"{what}: {ids} and {wanted}, sure up to {sure}"
        compared += sure
    assert compared >= len(QUESTIONS), f"{what}: nothing to compare"
