"""A row-parallel product by parts, with the rank rows in every place where they may be. Ranks are stand-ins."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="run tox -e triton")

from polyaccel.backend import Launcher, Ledger, Slice, TorchDevice, WeightSpec
from polyaccel_cuda import row_parallel
from polyaccel_cuda.communicator import CudaCommunicator
from polyaccel_cuda.operators import Issuer
from polyaccel_cuda.overlap import overlapped
from polyaccel_cuda.weight import FoldedWeight, allocate

ROWS, K = 300, 24
STARTS = (0, 128, 256, 300)
ADAPTERS: Any = object()


class InLine:
    def follow(self) -> None:
        return None

    def run(self, fn: Any) -> None:
        fn()

    def join(self) -> None:
        return None


class Twin(CudaCommunicator):
    """The other rank has the same numbers."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.asked = 0, 2, list[tuple[int, int]]()

    def parts(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
        self.asked.append((rows, columns))
        return STARTS

    def sum_in_parts(self, y: torch.Tensor, starts: tuple[int, ...], produce: Any) -> None:
        assert y.is_contiguous()
        overlapped(y, starts, produce, lambda part, index: part.mul_(2), InLine())


class Apart(Issuer):
    """Computes rank rows apart as the step's kernels do: as many columns as are asked for, and more."""

    def rank_rows(self, x: torch.Tensor, weight: FoldedWeight, step: Any, units: Any) -> torch.Tensor:
        assert units is ADAPTERS
        return x @ weight.rank_matrix(weight.spec.rank_rows).T


def written(n: int, rank_rows: int, bias: bool) -> FoldedWeight:
    spec = WeightSpec(
        site="o", slices=(Slice(name="o", n=n),), k=K, dtype=torch.float32, bias=bias, rank_rows=rank_rows
    )
    weight = allocate(spec, TorchDevice("cpu"))
    assert isinstance(weight, FoldedWeight)
    draw = torch.Generator().manual_seed(n)
    weight.tensor.copy_(torch.randn(n, K, generator=draw))
    if weight.bias is not None:
        weight.bias.copy_(torch.randn(n, generator=draw))
    weight.seal()
    weight.a_rows(0, 0, rank_rows).copy_(torch.randn(rank_rows, K, generator=draw))
    return weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n", "rank_rows", "used", "segmented"),
    [
        (40, 16, 0, False),
        (40, 16, 16, False),
        (40, 16, 8, False),
        (40, 16, 16, True),
        (37, 12, 12, False),
        (37, 5, 5, True),
    ],
    ids=["none", "folded", "a prefix", "segmented", "an odd width", "odd and segmented"],
)
def test_every_column_is_summed_once(n: int, rank_rows: int, used: int, segmented: bool, bias: bool) -> None:
    weight = written(n, rank_rows, bias)
    x = torch.randn(ROWS, 2 * K, generator=torch.Generator().manual_seed(1))[:, ::2]
    step: Any = SimpleNamespace(
        units=lambda site, row_set: ADAPTERS if used else None, rank_rows=used, segmented=segmented, listed=None
    )
    comm, issuer = Twin(), Apart(Launcher(Ledger()))
    found = row_parallel.by_parts(issuer, "row_parallel_linear", x, weight, step, comm)
    assert found is not None
    y, h, units = found
    dense = x.contiguous()
    wanted = torch.cat(
        [torch.nn.functional.linear(dense[i:j], weight.tensor, weight.bias) for i, j in pairwise(STARTS)]
    )
    torch.testing.assert_close(y, 2 * wanted, rtol=1e-5, atol=1e-4)
    assert (units is ADAPTERS) == bool(used)
    assert (h is None) == (not used)
    if h is not None:
        wanted = dense @ weight.a_rows(0, 0, used).T
        torch.testing.assert_close(h[:, :used], 2 * wanted, rtol=1e-5, atol=1e-4)
    # Ranks would hang if they asked for different widths: it depends on shapes and the step alone.
    assert comm.asked == [(ROWS, n + (h.shape[1] if h is not None else 0))]
    # The copy of the strided operand is counted, once.
    assert [name for name in issuer._launcher.ledger.counts() if name.startswith("copy")] != []


def test_few_rows_and_other_communicators_are_left_to_the_whole_sum() -> None:
    weight, issuer = written(40, 0, False), Apart(Launcher(Ledger()))
    step: Any = SimpleNamespace(units=lambda site, row_set: None, rank_rows=0, segmented=False)
    few = torch.zeros(64, K)
    assert row_parallel.by_parts(issuer, "row_parallel_linear", few, weight, step, Twin()) is None
    many: Any = SimpleNamespace(world_size=2)
    assert row_parallel.by_parts(issuer, "row_parallel_linear", torch.zeros(ROWS, K), weight, step, many) is None
    assert row_parallel.add_and_norm(few, many, few, few[0], 1e-5) is None
