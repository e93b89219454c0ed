"""Every family gives the same logits at every world size, with the base model's collectives and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyaccel.backend.communicator import Collective, SingleRank
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.weight import Weight
from polyaccel.models.model import Model
from tests.models.families import FAMILIES, LAYERS, CompositeBackend, build, open_saved
from tests.models.scenario import assert_close, drive, random_tokens
from tests.support.driver import StepDriver
from tests.support.thread_comm import ThreadCommunicator, run_ranks

KINDS = ["all_reduce"] * (1 + 2 * LAYERS) + ["all_gather"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_world_size_gives_the_logits_of_one_rank(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    whole = build(checkpoint)
    tokens = random_tokens(whole.vocabulary)
    expected = drive(StepDriver(whole, SingleRank()), tokens)
    for world in (2, 3, 4):
        for equal in (False, True):

            def rank(comm: ThreadCommunicator, world: int = world, equal: bool = equal) -> dict[int, torch.Tensor]:
                backend = CompositeBackend(equal=equal)
                model = build(checkpoint, rank=comm.rank, world_size=world, backend=backend)
                return drive(StepDriver(model, comm), tokens)

            results = run_ranks(world, rank)
            for number, logits in expected.items():
                for other in results[1:]:
                    assert torch.equal(results[0][number], other[number]), "ranks disagree"
                assert_close(results[0][number], logits, f"{family}, {world} ranks, equal={equal}, sequence {number}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_one_sum_for_the_embedding_two_a_layer_and_one_gather(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    hidden = checkpoint.hf_config()["hidden_size"]
    assert isinstance(hidden, int)

    def rank(comm: ThreadCommunicator) -> tuple[list[Collective], int]:
        driver = StepDriver(build(checkpoint, rank=comm.rank, world_size=2), comm)
        comm.trace = []
        width = driver.step({0: [1, 2, 3], 1: [4]}, last_only=True).shape[1]
        return comm.trace, width

    for trace, vocabulary in run_ranks(2, rank):
        assert [collective.kind for collective in trace] == KINDS
        assert {collective.nbytes for collective in trace[:-1]} == {4 * hidden * 4}
        assert trace[-1].nbytes == 2 * -(-vocabulary // 2) * 4


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {site: (weight.spec.n, weight.spec.k) for site, weight in model.weights().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_have_equal_shapes_where_the_backend_needs_them(tmp_path: Path, family: str, world: int) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    models = [
        build(checkpoint, rank=rank, world_size=world, backend=CompositeBackend(equal=True), load=False)
        for rank in range(world)
    ]
    assert all(_shapes(model) == _shapes(models[0]) for model in models)
    spec = models[0].kv_spec(1, 16, torch.float32)
    assert all(model.kv_spec(1, 16, torch.float32) == spec for model in models)
    requests = [[(r.site, r.operator, dict(r.static)) for r in model.requests()] for model in models]
    assert all(request == requests[0] for request in requests)


def test_weights_shrink_with_the_world_and_together_hold_the_model_once(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    whole = build(checkpoint, load=False).weights()
    for world in (2, 3, 4):
        ranks = [build(checkpoint, rank=rank, world_size=world, load=False).weights() for rank in range(world)]
        for site in ("layers.0.o", "layers.0.gate_up", "layers.0.down"):
            assert sum(rank[site].nbytes for rank in ranks) == whole[site].nbytes


@pytest.mark.parametrize("world", [2, 3, 4])
def test_padding_is_zero_whatever_memory_a_weight_was_given(tmp_path: Path, world: int) -> None:
    _, checkpoint = open_saved("llama3", tmp_path)
    for rank in range(world):
        backend = CompositeBackend(equal=True)
        model = build(checkpoint, rank=rank, world_size=world, backend=backend, load=False)
        for weight in model.weights().values():
            if weight.spec.tied_to is None:
                for stored in _tensors(weight):
                    stored.fill_(float("nan"))
        model.load(checkpoint)
        for site, weight in model.weights().items():
            assert all(stored.isfinite().all() for stored in _tensors(weight)), site


def _tensors(weight: Weight) -> list[torch.Tensor]:
    assert isinstance(weight, TensorWeight)
    return [weight.tensor] if weight.bias is None else [weight.tensor, weight.bias]


def test_a_bias_after_a_sum_is_held_by_the_first_rank_only(tmp_path: Path) -> None:
    _, checkpoint = open_saved("llama3", tmp_path)
    for rank in (0, 1):
        weights = build(checkpoint, rank=rank, world_size=2, load=False).weights()
        for layer in range(LAYERS):
            assert weights[f"layers.{layer}.o"].spec.bias == (rank == 0)
            assert weights[f"layers.{layer}.down"].spec.bias == (rank == 0)
            assert weights[f"layers.{layer}.qkv"].spec.bias


def test_more_ranks_than_query_heads_are_refused_with_both_numbers(tmp_path: Path) -> None:
    _, checkpoint = open_saved("mistral", tmp_path)
    with pytest.raises(ConfigurationError, match="5 exceeds the model's 4 query heads"):
        build(checkpoint, rank=0, world_size=5, load=False)
