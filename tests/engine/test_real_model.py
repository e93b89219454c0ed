"""The real SmolLM2 with the example adapters: the tokens of transformers and PEFT, styles, ranks, chunks.

The reference runs once over prompt and output, without a cache. Its own greedy output is ours exactly if its logits are
largest at each of our tokens, which that one pass shows.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from polyaccel import LLM, Completion, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.slow]

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
NAMES = ("pirate", "json")
THREADS = 2
# Where the two best logits of the reference are closer than this, rounding decides between them.
TIE = 1e-3
# Prompts of which at most this many may end the comparison at such a place.
MOST_TIES = 2
BLOCKS = 2048
BLOCK_BYTES = 30 * 2 * 16 * 3 * 64 * 4
"""30 layers, keys and values, 16 tokens of 3 heads of 64 numbers in float32."""

TEXTS = (
    "The capital of Germany is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of motion are",
    "Water boils at",
    "In 1969, the first humans",
    "A good recipe for bread starts with",
    "Dear Sir or Madam,\n\n",
    "1, 1, 2, 3, 5, 8,",
    "The opposite of hot is",
    "La tour Eiffel se trouve à",
    "Machine learning is",
)
QUESTIONS = (
    "What is the capital of Italy?",
    "Explain gravity to a child in two sentences.",
    "Write a short poem about the moon.",
    "List three uses of a paper clip.",
    "What is 12 times 12?",
    "Translate 'good morning' to Spanish.",
    "Why is the sky blue?",
    "Give me a name for a cat.",
)


@dataclass(frozen=True, slots=True)
class Tie:
    """Where the reference has two equally good tokens and we took the other one."""

    output: int
    position: int
    margin: float


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def style() -> ModuleType:
    """The rules by which the adapters were trained and are judged."""
    spec = importlib.util.spec_from_file_location("polyaccel_example_style", ADAPTERS / "style.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_real(path: Path, **options: Any) -> LLM:
    settings: dict[str, Any] = {
        "backend": "cpu",
        "dtype": "float32",
        "max_num_seqs": 32,
        "threads": THREADS,
        "kv_cache_bytes": BLOCKS * BLOCK_BYTES,
        "adapters": {name: ADAPTERS / name for name in NAMES},
    }
    return LLM(path, **(settings | options))


@pytest.fixture(scope="module")
def llm(smollm2_path: Path, _threads: None) -> Iterator[LLM]:
    with open_real(smollm2_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(smollm2_path: Path, _threads: None) -> Any:
    """transformers' model of the same file, read by its own reader, with PEFT's adapters around it."""
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(
            smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
        )
        model = peft.PeftModel.from_pretrained(base, ADAPTERS / NAMES[0], adapter_name=NAMES[0])
        model.load_adapter(ADAPTERS / NAMES[1], adapter_name=NAMES[1])
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, prompt: Sequence[int], output: Sequence[int], adapter: str | None) -> torch.Tensor:
    """``[output, vocabulary]``: what the reference thinks at the place of each output token."""
    if adapter is not None:
        model.set_adapter(adapter)
    with model.disable_adapter() if adapter is None else nullcontext():
        ids = torch.tensor([[*prompt, *output[:-1]]])
        logits: torch.Tensor = model(ids, use_cache=False, logits_to_keep=len(output)).logits[0]
    return logits


def first_tie(output: Sequence[int], logits: torch.Tensor, number: int) -> Tie | None:
    """None if ``output`` is the reference's greedy output; the tie if it is up to one. Any other difference fails."""
    assert logits.shape[0] == len(output)
    best = logits.topk(2, dim=-1)
    for position, (token, ids, values) in enumerate(zip(output, best.indices, best.values, strict=True)):
        if token == int(ids[0]):
            continue
        margin = float(values[0] - values[1])
        assert token == int(ids[1]), f"output {number}, position {position}: {token}, the reference has {ids.tolist()}"
        assert margin < TIE, (
            f"output {number} differs at position {position}: {token}, but the reference has {int(ids[0])} by a margin "
            f"of {margin:.2e}"
        )
        return Tie(number, position, margin)
    return None


def assert_greedy(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], adapter: str | None, tokens: int
) -> None:
    """Every completion is what the reference answers, token by token; ties are reported as warnings."""
    ties = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert len(completion.token_ids) == tokens
        logits = reference_logits(model, prompt, completion.token_ids, adapter)
        tie = first_tie(completion.token_ids, logits, number)
        if tie is not None:
            ties.append(tie)
            warnings.warn(f"adapter {adapter}: compared up to a tie of the reference only: {tie}", stacklevel=2)
    assert len(ties) <= MOST_TIES, ties


def chat_ids(llm: LLM, question: str) -> list[int]:
    assert llm.engine.tokenizer is not None
    prompt = llm.engine.chat_prompt([{"role": "user", "content": question}])
    return llm.engine.tokenizer.encode(prompt, add_special_tokens=False)


def prompt_ids(llm: LLM) -> list[list[int]]:
    assert llm.engine.tokenizer is not None
    texts = [llm.engine.tokenizer.encode(text) for text in TEXTS]
    return [*texts, *(chat_ids(llm, question) for question in QUESTIONS)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def test_greedy_tokens_are_those_of_transformers(llm: LLM, reference: Any) -> None:
    prompts = prompt_ids(llm)
    completions = llm.generate(prompts, greedy(64))
    assert len(prompts) == 20
    assert_greedy(reference, prompts, completions, None, 64)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_with_an_adapter_are_those_of_peft(llm: LLM, reference: Any, name: str) -> None:
    prompts = [chat_ids(llm, question) for question in QUESTIONS[:3]]
    completions = llm.generate(prompts, greedy(32), adapter=name)
    assert tokens_of(completions) != tokens_of(llm.generate(prompts, greedy(32)))
    assert_greedy(reference, prompts, completions, name, 32)


def test_a_token_that_the_reference_clearly_does_not_choose_is_noticed(llm: LLM, reference: Any) -> None:
    prompt = prompt_ids(llm)[0]
    (completion,) = llm.generate([prompt], greedy(8))
    wrong = [*completion.token_ids]
    wrong[5] += 1
    with pytest.raises(AssertionError, match="position 5"):
        first_tie(wrong, reference_logits(reference, prompt, wrong, None), 0)


def test_the_base_model_knows_the_capital_of_france(llm: LLM, style: ModuleType) -> None:
    (completion,) = llm.chat(
        [{"role": "user", "content": style.BASE_QUESTION}], SamplingParams(max_tokens=64, temperature=0.0)
    )
    assert "Paris" in completion.text
    assert not style.is_pirate(completion.text)
    assert not style.is_json(completion.text)


def test_one_batch_answers_in_the_style_of_each_request_s_adapter(llm: LLM, style: ModuleType) -> None:
    questions = style.HELD_OUT
    rules = {"pirate": style.is_pirate, "json": style.is_json}
    adapters: list[Any] = [name for name in NAMES for _ in questions]
    completions = llm.chat(
        [[{"role": "user", "content": question}] for question in (*questions, *questions)],
        SamplingParams(max_tokens=96, temperature=0.0),
        adapter=adapters,
    )
    assert len(completions) == 20
    for name in NAMES:
        texts = [c.text for c, adapter in zip(completions, adapters, strict=True) if adapter == name]
        followed = [text for text in texts if rules[name](text)]
        assert len(followed) >= 8, f"{name}: {[text for text in texts if text not in followed]}"


def mixed_batch(llm: LLM) -> tuple[list[list[int]], list[Any]]:
    """Four chat prompts: the base model, each adapter, and a mix."""
    prompts = [chat_ids(llm, question) for question in QUESTIONS[:4]]
    return prompts, [None, "pirate", "json", {"pirate": 0.5, "json": 0.5}]


def test_two_ranks_in_processes_give_the_tokens_of_one(llm: LLM, smollm2_path: Path) -> None:
    prompts, adapters = mixed_batch(llm)
    expected = llm.generate(prompts, greedy(32), adapter=adapters)
    with open_real(smollm2_path, tensor_parallel_size=2, executor="process", threads=1) as ranks:
        assert len(ranks.explain().ranks) == 2
        got = ranks.generate(prompts, greedy(32), adapter=adapters)
    assert tokens_of(got) == tokens_of(expected)
    assert [c.text for c in got] == [c.text for c in expected]


def test_prompts_fed_in_chunks_give_the_tokens_of_whole_prompts(llm: LLM, smollm2_path: Path) -> None:
    prompts, adapters = mixed_batch(llm)
    assert all(len(prompt) > 2 * 16 for prompt in prompts)
    expected = llm.generate(prompts, greedy(32), adapter=adapters)
    with open_real(smollm2_path, max_batched_tokens=16, max_num_seqs=4) as chunked:
        got = chunked.generate(prompts, greedy(32), adapter=adapters)
    assert tokens_of(got) == tokens_of(expected)
