"""One engine over several devices of one process: the simulated machine refuses what reads another device's memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from polyaccel import LLM, SamplingParams
from polyaccel.backend import Backend, TableBackend
from polyaccel_conformance.simulated.backend import SimulatedBackend
from tests.models.families import LAYERS, random_reference, save

PROMPTS = [[5, 6, 7], [9, 3, 11, 12, 4], [8] * 9]
PARAMS = [
    SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=1.0, seed=3, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_reference("llama"), tmp_path_factory.mktemp("llama"))


def answers(model: Path, backend: Backend, layers: tuple[int, ...] | None, overlap: bool = True) -> list[list[int]]:
    with LLM(
        model,
        backend=backend,
        executor="inline",
        dtype="float32",
        layer_devices=None if layers is None else list(layers),
        max_num_seqs=4,
        kv_cache_bytes=4 << 20,
        graphs=False,
        overlap=overlap,
        policy="allow",
    ) as llm:
        return [list(done.token_ids) for params in PARAMS for done in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("layers", list(itertools.product((0, 1), repeat=LAYERS)), ids=str)
def test_layers_on_any_devices_say_the_same(model: Path, layers: tuple[int, ...], overlap: bool) -> None:
    assert answers(model, SimulatedBackend(), layers, overlap) == answers(model, TableBackend("cpu", {}), None)
