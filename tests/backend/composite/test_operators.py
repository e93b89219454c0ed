from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

from polyaccel.backend.backend import Backend
from polyaccel.backend.communicator import Communicator, SingleRank
from polyaccel.backend.composite.operators import CompositeOperators
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.device import Device, TorchDevice
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.step import DeviceState
from polyaccel.backend.table import TableBackend
from polyaccel.backend.vocabulary import OPERATORS
from polyaccel.backend.weight import Weight
from tests.backend.composite.cases import Draw, NoReadback, Readback, rows_of, spec_of, step_input

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
