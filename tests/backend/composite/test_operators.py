from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.backend import Backend
from polyaccel.backend.communicator import Communicator, SingleRank
from polyaccel.backend.composite.operators import CompositeOperators
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.device import Device, TorchDevice
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVSpec
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.sampling import SamplingRow, SamplingSpec
from polyaccel.backend.step import DeviceState
from polyaccel.backend.table import TableBackend
from polyaccel.backend.vocabulary import OPERATORS
from polyaccel.backend.weight import Quantisation, Weight
from tests.backend.composite.cases import Draw, Module, NoReadback, Readback, pack, rows_of, spec_of, step_input

TABLE = TableBackend("cpu", {}).composites()


def test_every_operator_that_is_not_mandatory_has_a_composite() -> None:
    assert set(TABLE) == {name for name, spec in OPERATORS.items() if not spec.mandatory}


@pytest.mark.parametrize("name", list(TABLE))
def test_a_composite_takes_exactly_the_specified_arguments(name: str) -> None:
    parameters = inspect.signature(TABLE[name]).parameters
    specified = OPERATORS[name].arguments
    assert list(parameters) == [argument.name for argument in specified]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert all(parameters[a.name].default is None for a in specified if a.optional and a.name != "bias")


# -- readbacks -------------------------------------------------------------------------------------------------------

X = torch.tensor([1.0, 0.0, 2.0])


@pytest.mark.parametrize(
    "fn",
    [
        lambda: X[0].item(),
        lambda: X.tolist(),
        lambda: bool(X.any()),
        lambda: X[X > 0],
        lambda: X.nonzero(),
        lambda: torch.where(X > 0),
        lambda: X.masked_select(X > 0),
        lambda: X.unique(),
        lambda: torch.unique_consecutive(X),
        lambda: X.long().bincount(),
        lambda: X.repeat_interleave(X.long()),
        lambda: torch.equal(X, X),
        lambda: X.clone().__setitem__(X > 0, torch.ones(2)),
        lambda: torch.tensor([1, 2]),
    ],
)
def test_the_watch_on_readbacks_catches_them(fn: Callable[[], object]) -> None:
    fn()
    with NoReadback(), pytest.raises(Readback):
        fn()


# -- a device without values -----------------------------------------------------------------------------------------


class MetaDevice(TorchDevice):
    """A torch device that has shapes but no values: whatever reads one fails, and so does meeting a CPU tensor."""

    def __init__(self) -> None:
        super().__init__("meta")


@pytest.fixture(params=[False, True], ids=["plain", "adapters"])
def anywhere(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Operands for all operators on a device without values."""
    device, backend = MetaDevice(), TableBackend("meta", {})
    adapted = bool(request.param)
    specs = {
        "embed": spec_of("embed", [11], 8, rank_rows=8, lookup=True),
        "qkv": spec_of("qkv", [8, 4, 4], 8, rank_rows=8, bias=True),
        "gate_up": spec_of("gate_up", [6, 6], 8, rank_rows=8, experts=3),
        "down": spec_of("down", [8], 6, rank_rows=8, experts=3),
        "packed": spec_of("packed", [6, 6], 8, experts=3, quantisation=Quantisation(group_size=4)),
    }
    weights = {name: backend.allocate_weight(spec, device) for name, spec in specs.items()}
    store = backend.allocate_adapters(weights, rank_rows=8, slots=3, device=device)
    modules = [Module("embed", 0, 2), Module("qkv", 1, 3), Module("down", 0, 2, 1), Module("gate_up", 1, 2, 0)]
    on_host = {name: TensorWeight(spec, TorchDevice("cpu")) for name, spec in specs.items()}
    store.write(SlotRange(slot=1, first_rank_row=0, rank_rows=4), pack(on_host, modules, Draw(0)))
    cache = backend.allocate_kv(
        KVSpec(layers=1, kv_heads=1, head_dim=4, dtype=torch.float32, blocks=9, block_size=4), device
    )
    sampling = backend.allocate_sampling(SamplingSpec(request_slots=4, vocabulary=11), device)
    sampling.write(0, SamplingRow(top_p=0.5, top_k=3, min_p=0.1, logprobs=2, repetition_penalty=1.2))
    sampling.write(
        1,
        SamplingRow(
            temperature=0.0,
            bias_ids=np.array([1]),
            bias_values=np.array([1.0]),
            allowed=np.ones(11, dtype=bool),
            forbidden_ids=np.array([3]),
            forbidden_until=1,
        ),
    )
    triples = [(0, 1, 1.0), (2, 1, 0.5), (3, 1, 1.0), (1, 2, 1.0)] if adapted else []
    inputs = step_input(
        [(1, 6), (4, 5), (1, 1)],
        token_ids=[-1, 3, 4, 5, 6, -2],
        positions=[5, 1, 2, 3, 4, 0],
        block_tables=np.arange(6, dtype=np.int32).reshape(3, 2),
        kv_slots=[5, 9, 10, 11, 12, -1],
        logits_rows=[0, 4, 5],
        sample_slots=[0, 1, 2],
        uniforms=[0.5, 0.0, 0.0],
        adapters={"tokens": triples, "logits": triples[:1]},
    )
    step = backend.begin_step(inputs, DeviceState(kv=cache, adapters=store, sampling=sampling), device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    routed = {"x": empty(6, 8), "ids": empty(6, 2, dtype=torch.int32), "weights": empty(6, 2), "step": step}
    q, k = empty(6, 2, 4), empty(6, 1, 4)
    comm = SingleRank()
    return {
        "embedding": ({"weight": weights["embed"], "step": step, "vocabulary_start": 0}, (6, 8)),
        "rms_norm": ({"x": empty(6, 8), "weight": empty(8), "eps": 1e-5}, (6, 8)),
        "layer_norm": ({"x": empty(6, 8), "weight": empty(8), "bias": empty(8), "eps": 1e-5}, (6, 8)),
        "rotary_embedding": (
            {"q": q, "k": k, "rope": RopeTable(cos=empty(9, 2), sin=empty(9, 2), rotary_dim=4), "step": step},
            None,
        ),
        "silu_and_mul": ({"x": empty(6, 8)}, (6, 4)),
        "gelu": ({"x": empty(6, 8), "approximate": "tanh"}, (6, 8)),
        "select_rows": ({"x": empty(6, 8), "step": step}, (3, 8)),
        "write_kv_cache": ({"k": k, "v": k, "kv": cache, "layer": 0, "step": step}, None),
        "paged_attention": (
            {"q": q, "kv": cache, "layer": 0, "step": step, "scale": 0.5, "window": 3},
            (6, 2, 4),
        ),
        "dense_attention": ({"q": q, "k": k, "v": k, "starts": [0, 2, 6], "scale": 1.0, "causal": True}, (6, 2, 4)),
        "sgmv": (
            {"y": empty(6, 16), "x": empty(6, 8), "weight": weights["qkv"], "step": step, "row_set": "tokens"},
            (6, 16),
        ),
        "sgmv_shrink": (
            {"x": empty(6, 8), "weight": weights["qkv"], "step": step, "row_set": "tokens"},
            (len(triples), 3, 3 if adapted else 0),
        ),
        "sgmv_expand": (
            {
                "y": empty(6, 16),
                "h": empty(len(triples), 3, 3),
                "weight": weights["qkv"],
                "step": step,
                "row_set": "tokens",
            },
            (6, 16),
        ),
        "moe_route": (
            {
                "logits": empty(6, 8),
                "top_k": 2,
                "scoring": "sigmoid",
                "renormalise": True,
                "bias": empty(8),
                "groups": 4,
                "topk_groups": 2,
                "scale": 1.0,
            },
            None,
        ),
        "moe_experts": ({**routed, "gate_up": weights["gate_up"], "down": weights["down"], "act": "silu"}, (6, 8)),
        "sample": ({"logits": empty(3, 11), "state": sampling, "step": step}, None),
        "all_reduce": ({"x": empty(3), "comm": comm}, (3,)),
        "all_gather": ({"x": empty(3), "comm": comm, "dim": 0}, (3,)),
        "reduce_scatter": ({"x": empty(3), "comm": comm}, (3,)),
        "all_to_all": ({"x": empty(3), "comm": comm, "send_rows": [3], "receive_rows": [3]}, (3,)),
        "broadcast": ({"x": empty(3), "comm": comm, "source": 0}, (3,)),
        "barrier": ({"comm": comm}, None),
    }


def test_every_composite_runs_on_a_device_that_cannot_be_read(anywhere: dict[str, Any]) -> None:
    composites = TableBackend("meta", {}).composites()
    assert set(anywhere) == set(composites)
    for name, (arguments, shape) in anywhere.items():
        result = composites[name](**arguments)
        if shape is not None:
            assert isinstance(result, torch.Tensor), name
            assert tuple(result.shape) == shape, name
            assert result.device.type == "meta", name


def test_quantised_experts_run_on_a_device_that_cannot_be_read(anywhere: dict[str, Any]) -> None:
    backend = TableBackend("meta", {})
    arguments = dict(anywhere["moe_experts"][0])
    packed = spec_of("gate_up", [6, 6], 8, rank_rows=8, experts=3, quantisation=Quantisation(group_size=4))
    arguments["gate_up"] = backend.allocate_weight(packed, backend.devices()[0])
    result = backend.composites()["moe_experts"](**arguments)
    assert isinstance(result, torch.Tensor)
    assert result.shape == (6, 8)


# -- a backend's own weights and ranks -------------------------------------------------------------------------------


class Transposed(Weight):
    """A weight in another layout, which only its backend can read."""

    def __init__(self, inner: TensorWeight) -> None:
        self.spec = inner.spec
        self.stored = inner.tensor.transpose(-1, -2).contiguous()

    def write(self, slice_index: int, source: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def write_bias(self, slice_index: int, source: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def write_quantised(self, slice_index: int, *parts: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def seal(self) -> None: ...

    def reopen(self) -> None: ...

    @property
    def nbytes(self) -> int:
        return self.stored.numel() * self.stored.element_size()


def operators_with(dequantize: Callable[..., object]) -> CompositeOperators:
    backend: Backend = TableBackend("cpu", {"dequantize": dequantize})
    return CompositeOperators(backend)


def test_weights_are_read_through_the_backends_dequantize() -> None:
    table = TensorWeight(spec_of("embed", [5], 3, lookup=True), TorchDevice("cpu"))
    table.write(0, Draw(0).tensor(5, 3))
    operators = operators_with(lambda weight: weight.stored.T)
    device: Device = TorchDevice("cpu")
    step = TableBackend("cpu", {}).begin_step(step_input([(2, 2)], token_ids=[4, 1]), DeviceState(), device)
    x = operators.embedding(Transposed(table), step, 0)
    assert torch.equal(x, table.tensor[[4, 1]])
    with pytest.raises(OperatorError, match="returned str"):
        operators_with(lambda weight: "nothing").embedding(Transposed(table), step, 0)


class Recorder(SingleRank):
    """Notes which collective was called with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self.calls.append(("all_gather", dim))
        return x

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        self.calls.append(("all_to_all", send_rows, receive_rows))
        return x

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        self.calls.append(("broadcast", source))

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(("reduce_scatter",))
        return x

    def _all_reduce(self, x: torch.Tensor) -> None:
        self.calls.append(("all_reduce",))

    def _barrier(self) -> None:
        self.calls.append(("barrier",))


def test_rank_operators_call_the_communicator() -> None:
    comm = Recorder()
    assert isinstance(comm, Communicator)
    x = torch.ones(2, 2)
    assert TABLE["all_reduce"](x, comm) is x
    TABLE["all_gather"](x, comm, 0)
    TABLE["reduce_scatter"](x, comm)
    TABLE["all_to_all"](x, comm, [2], [2])
    assert TABLE["broadcast"](x, comm, 0) is x
    TABLE["barrier"](comm)
    assert comm.calls == [
        ("all_reduce",),
        ("all_gather", 0),
        ("reduce_scatter",),
        ("all_to_all", [2], [2]),
        ("broadcast", 0),
        ("barrier",),
    ]


def test_triples_are_ordered_by_slot_then_row() -> None:
    rows = rows_of([(3, 1, 1.0), (0, 2, 1.0), (1, 1, 1.0)])
    assert rows.rows.tolist() == [1, 3, 0]
    assert rows.starts.tolist() == [0, 2, 3]
