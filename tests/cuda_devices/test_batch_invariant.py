"""``batch_invariant`` on a GPU: a request's tokens and log-probabilities have the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polyaccel
from tests.cuda_devices.model import VOCABULARY, write
from tests.cuda_devices.pool import GPUS

pytestmark = pytest.mark.skipif(not GPUS, reason="needs a CUDA device")

HIDDEN, RANKS, NEW = 1024, (8, 64), 12
Said = tuple[tuple[int, ...], tuple[float, ...]]
"""Token ids, and the log-probabilities of the best tokens at each place."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("invariant"), HIDDEN, RANKS, "bfloat16")


@pytest.fixture(scope="module")
def requests() -> list[tuple[list[int], str | None]]:
    """Prompts of 1 to 300 tokens, without an adapter and with one of two."""
    generator = np.random.default_rng(1)
    lengths = [1, 2, 15, 64, 65, 130, 300, 7, 33, 200, 90, 129]
    names = [None, "r8", "r64", "r8", None, "r64", None, "r64", "r8", "r8", None, "r8"]
    return [(generator.integers(3, VOCABULARY, n).tolist(), name) for n, name in zip(lengths, names, strict=True)]


def opened(folder: Path, **options: Any) -> polyaccel.LLM:
    return polyaccel.LLM(
        folder / "model",
        backend="cuda",
        max_model_len=512,
        max_num_seqs=80,
        kv_cache_bytes=256 << 20,
        executor="inline",
        policy="strict",
        adapters={f"r{rank}": folder / f"r{rank}" for rank in RANKS},
        **options,
    )


def said(llm: polyaccel.LLM, requests: Sequence[tuple[list[int], str | None]]) -> list[Said]:
    params = polyaccel.SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=5)
    out = llm.generate([prompt for prompt, _ in requests], params, adapter=[name for _, name in requests])
    return [(tuple(o.token_ids), tuple(p for one in o.logprobs or () for _, p in one.top)) for o in out]


@pytest.fixture(scope="module")
def alone(folder: Path, requests: list[tuple[list[int], str | None]]) -> Iterator[list[Said]]:
    with opened(folder, batch_invariant=True, prefix_caching=False) as llm:
        yield [said(llm, [one])[0] for one in requests]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"graphs": False},
        {"max_batched_tokens": 48},
        {"max_batched_tokens": 97, "overlap": False},
        {"prefix_caching": True},
    ],
    ids=str,
)
def test_a_request_is_answered_with_the_same_bits_in_any_company(
    folder: Path, requests: list[tuple[list[int], str | None]], alone: list[Said], options: dict[str, Any]
) -> None:
    crowd = requests * 6
    with opened(folder, batch_invariant=True, **{"prefix_caching": False, **options}) as llm:
        for _ in range(2):
            for i, got in enumerate(said(llm, crowd)):
                assert got == alone[i % len(requests)], f"request {i} of {len(crowd)}"
        few = said(llm, requests[3:6])
    assert few == alone[3:6]


def test_without_it_some_request_has_other_bits(
    folder: Path, requests: list[tuple[list[int], str | None]], alone: list[Said]
) -> None:
    with opened(folder, prefix_caching=False) as llm:
        single = [said(llm, [one])[0] for one in requests]
        crowd = said(llm, requests * 6)
    assert any(got != single[i % len(requests)] for i, got in enumerate(crowd)), "the test above could not fail"
    # And both forms say nearly the same.
    for (_, ours), (_, theirs) in zip(alone, single, strict=True):
        assert np.allclose(ours[:5], theirs[:5], atol=0.1), "log-probabilities of the first token"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [4096, 1416, 100])
def test_few_rows_and_many_have_the_same_bits(dtype: torch.dtype, k: int) -> None:
    from polyaccel_cuda.kernels.invariant import product

    torch.manual_seed(0)
    n = 6152
    x = torch.randn(700, k, device="cuda", dtype=dtype)
    matrix, bias = torch.randn(n, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
    whole = product(x, matrix, bias)
    wide = torch.nn.functional.linear(x.double(), matrix.double(), bias.double())
    # One rounding of the result, and those of sums of k terms in float32.
    room = 2 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * k**0.5
    assert (whole.double() - wide).abs().max() <= room * wide.abs().max()
    for rows in (1, 2, 16, 17, 33, 64, 65, 128, 129, 300):
        for begin in (0, 350):
            part = product(x[begin : begin + rows], matrix, bias)
            assert torch.equal(part, whole[begin : begin + rows]), f"{rows} rows from {begin}"
