"""One call of a station over ranks: its operands on each rank, and the sum that all of them must end with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyaccel.backend import AdapterRows, PackedAdapter, PackedEntry, StepInput, TokenClass

ROW_PARALLEL = ("row_parallel_linear", "row_parallel_add_norm")
COLUMN = ("column_linear", "gate_up_act")
LAYOUTS = ("dense", "transposed", "columns", "rows", "offset", "expanded")
SITE = "s"
EPS = 1e-5
Wide = NDArray[np.float64]


@dataclass(frozen=True)
class StationCase:
    """What is called. Sizes are those of one rank.

    Attributes:
        widths: of the weight's slices.
        layout: of x on the device.
        adapters: the rank of the adapter in each slot; row i uses slot ``i % (slots + 1) - 1``, -1 none.
        second_group: another communicator is open while the call is planned.
    """

    station: str
    token_class: str
    dtype: str
    rows: int
    k: int
    widths: tuple[int, ...]
    bias: bool = False
    layout: str = "dense"
    adapters: tuple[int, ...] = ()
    second_group: bool = False
    reduce: bool = True
    seed: int = 0

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> StationCase:
        """From what :meth:`plain` gives, by way of JSON."""
        lists = {name: tuple(value[name]) for name in ("widths", "adapters")}
        return cls(**{**value, **lists})

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def n(self) -> int:
        return sum(self.widths)

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def numbers(self, name: str, rank: int, *shape: int) -> torch.Tensor:
        """Values of the case's dtype; the same on every rank for a rank and a name."""
        if self.layout == "expanded" and name == "x":
            return self._drawn(name, rank, 1, shape[1]).expand(shape)
        return self._drawn(name, rank, *shape)

    def _drawn(self, name: str, rank: int, *shape: int) -> torch.Tensor:
        seed = hash_of(f"{self.seed} {name} {rank}")
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.torch_dtype)

    def x(self, rank: int) -> torch.Tensor:
        """``[rows, k]``: this rank's columns in a row-parallel station, else the same on all ranks."""
        return self.numbers("x", rank if self.station in ROW_PARALLEL else 0, self.rows, self.k)

    def matrix(self, rank: int) -> torch.Tensor:
        return self.numbers("w", rank, self.n, self.k)

    def bias_of(self, rank: int) -> torch.Tensor | None:
        """In a row-parallel station rank 0 holds the one bias."""
        if not self.bias or (rank and self.station in ROW_PARALLEL):
            return None
        return self.numbers("bias", rank, self.n) * 8

    def a(self, rank: int, slot: int, part: int) -> torch.Tensor:
        """``[adapter's rank, k]``: cut by input where x is."""
        cut = rank if self.station in ROW_PARALLEL else 0
        return self.numbers(f"a{slot}.{part}", cut, self.adapters[slot], self.k)

    def b(self, rank: int, slot: int, part: int) -> torch.Tensor:
        """``[width, adapter's rank]``: cut by output where the weight is."""
        cut = 0 if self.station in ROW_PARALLEL else rank
        return self.numbers(f"b{slot}.{part}", cut, self.widths[part], self.adapters[slot]) / 4

    def residual(self) -> torch.Tensor:
        return self.numbers("residual", 0, self.rows, self.n)

    def norm_weight(self) -> torch.Tensor:
        return self.numbers("norm", 0, self.n)

    @property
    def slots(self) -> NDArray[np.int32]:
        """By row; -1 where the row has no adapter."""
        return (np.arange(self.rows) % (len(self.adapters) + 1) - 1).astype(np.int32)

    def step_input(self) -> StepInput:
        slots = self.slots
        used = np.flatnonzero(slots >= 0).astype(np.int32)
        rows = AdapterRows.build(used, slots[used], np.ones(len(used), dtype=np.float32))
        decode = self.token_class == "decode"
        sequences = self.rows if decode else 1
        whole = np.arange(self.rows, dtype=np.int64)
        starts = np.arange(self.rows + 1) if decode else np.array([0, self.rows])
        return StepInput(
            token_class=TokenClass(self.token_class),
            token_ids=whole * 0,
            positions=whole,
            query_starts=starts.astype(np.int32),
            context_lengths=np.full(sequences, 1 if decode else self.rows, dtype=np.int32),
            block_tables=np.zeros((sequences, 1), dtype=np.int32),
            kv_slots=whole,
            request_slots=np.arange(sequences, dtype=np.int32),
            logits_rows=np.zeros(0, dtype=np.int32),
            sample_slots=np.zeros(0, dtype=np.int32),
            uniforms=np.zeros(0, dtype=np.float32),
            adapters={"tokens": rows} if len(rows) else {},
        )

    def packed(self, rank: int, slot: int) -> PackedAdapter:
        """A slot's adapter as it is written into the store."""
        parts: list[torch.Tensor] = []
        entries, at = [], 0
        for part, width in enumerate(self.widths):
            a, b = self.a(rank, slot, part), self.b(rank, slot, part)
            entry = PackedEntry(
                site=SITE,
                slice=part,
                expert=None,
                kind="linear",
                rank=self.adapters[slot],
                a_offset=at,
                a_shape=(self.adapters[slot], self.k),
                b_offset=at + a.numel(),
                b_shape=(width, self.adapters[slot]),
            )
            entries.append(entry)
            parts += [a.reshape(-1), b.reshape(-1)]
            at += a.numel() + b.numel()
        return PackedAdapter(buffer=torch.cat(parts), entries=tuple(entries), max_rank=self.adapters[slot])

    def expected(self, world: int, rank: int) -> tuple[list[Wide], list[Wide]]:
        """The outputs in float64, and for each the size of what was added up, which bounds its error."""
        ranks = range(world) if self.station in ROW_PARALLEL and self.reduce else (rank,)
        total, size = np.zeros((self.rows, self.n)), np.zeros((self.rows, self.n))
        for one in ranks:
            product, magnitude = self._linear(one)
            total, size = total + product, size + magnitude
        if self.station == "row_parallel_add_norm":
            return self._normed(total, size)
        if self.station == "gate_up_act":
            return self._gated(total, size)
        return [total], [size]

    def _linear(self, rank: int) -> tuple[Wide, Wide]:
        x, w = wide(self.x(rank)), wide(self.matrix(rank))
        total, size = x @ w.T, abs(x) @ abs(w).T
        bias = self.bias_of(rank)
        if bias is not None:
            total, size = total + wide(bias), size + abs(wide(bias))
        starts = np.cumsum((0, *self.widths))
        for slot in range(len(self.adapters)):
            mine = self.slots == slot
            for part in range(len(self.widths)):
                a, b = wide(self.a(rank, slot, part)), wide(self.b(rank, slot, part))
                columns = slice(starts[part], starts[part + 1])
                total[mine, columns] += x[mine] @ a.T @ b.T
                size[mine, columns] += abs(x[mine]) @ abs(a).T @ abs(b).T
        return total, size

    def _normed(self, total: Wide, size: Wide) -> tuple[list[Wide], list[Wide]]:
        summed = total + wide(self.residual())
        size = size + abs(wide(self.residual()))
        weight = wide(self.norm_weight())
        scale = 1 / np.sqrt((summed**2).mean(-1, keepdims=True) + EPS)
        spread = (abs(summed) * size).mean(-1, keepdims=True) * scale**2
        return [summed * scale * weight, summed], [(size + abs(summed) * spread) * scale * abs(weight), size]

    def _gated(self, total: Wide, size: Wide) -> tuple[list[Wide], list[Wide]]:
        half = self.n // 2
        gate, up = total[:, :half], total[:, half:]
        act = gate / (1 + np.exp(-gate))
        return [act * up], [1.1 * size[:, :half] * abs(up) + abs(act) * size[:, half:] + abs(act * up)]


def wide(tensor: torch.Tensor) -> Wide:
    found: Wide = tensor.double().numpy()
    return found


def hash_of(text: str) -> int:
    """The same in every process."""
    value = 0
    for byte in text.encode():
        value = (value * 131 + byte) % (2**31 - 1)
    return value


def laid_out(x: torch.Tensor, layout: str, device: torch.device) -> torch.Tensor:
    """``x: [rows, k]`` on the device, in one of :data:`LAYOUTS`."""
    if layout == "transposed":
        return x.t().contiguous().to(device).t()
    if layout == "columns":
        return torch.cat((x, x + 1), 1).to(device)[:, : x.shape[1]]
    if layout == "rows":
        return torch.stack((x, x + 1), 1).flatten(0, 1).to(device)[::2]
    if layout == "offset":
        return torch.cat((x + 1, x)).to(device)[len(x) :]
    if layout == "expanded":
        return x[:1].contiguous().to(device).expand(x.shape)
    return x.contiguous().to(device)
