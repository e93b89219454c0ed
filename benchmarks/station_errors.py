"""How far a layer's stations are from float64, in terms of what the adapters change there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cuda_model import EPS, Model, Stations

from polyaccel.backend import Step

ALLOWED = 0.05
"""Of the norm of what the adapters change in a row, on average over rows: they add a quarter to what the weights give,
and the sum is rounded to 8 bits once, by peers more often, which makes 1 to 2 percent. A row with another adapter, or
without, is wrong by 1.4 or 1.
"""


class Reference:
    """The float64 results of one layer. ``slots``: of each row."""

    def __init__(self, model: Model, layer: int, slots: Sequence[int], rank: int) -> None:
        self._model, self._layer = model, layer
        self._device = model.device.torch_device
        self._slots = torch.tensor(list(slots), device=self._device)
        self._matrices: dict[tuple[int, str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for slot in sorted(set(slots)):
            packed = model.adapter(slot, rank)
            for entry in packed.entries:
                if entry.site.partition(".")[0] == str(layer):
                    shapes = (entry.a_offset, entry.a_shape), (entry.b_offset, entry.b_shape)
                    a, b = (packed.buffer[i : i + p * q].view(p, q).double() for i, (p, q) in shapes)
                    self._matrices[slot, entry.site, entry.slice] = (a, b)

    def errors(self, stations: Stations, step: Step) -> dict[str, float]:
        """By site, of the worst row, in units of what the adapters change in one."""
        shape, layer = self._model.shape, self._layer
        kv: Any = self._model.kv
        draw = torch.Generator(self._device).manual_seed(1)

        def random(columns: int) -> torch.Tensor:
            size = (len(self._slots), columns)
            return torch.randn(size, dtype=self._model.dtype, device=self._device, generator=draw)

        found: dict[str, float] = {}
        x = random(shape.hidden)
        q = stations.qkv(x, layer, step)
        k, v = kv.read(layer, step.tensor("kv_slots"))
        whole = torch.cat([part.reshape(len(x), -1) for part in (q, k, v)], 1)
        plain, exact = self._linear("qkv", x)
        found["qkv"] = _worst(whole, self._turned(plain, step), self._turned(exact, step))
        plain, exact = self._linear("gate_up", x)
        found["gate_up"] = _worst(stations.gate_up(x, layer, step), _activated(plain), _activated(exact))
        residual = random(shape.hidden)
        for name, width in (("o", shape.heads * shape.head_dim), ("down", shape.ffn)):
            x = random(width)
            both = torch.cat(stations.add_norm(x, f"{layer}.{name}", step, residual), 1)
            plain, exact = self._linear(name, x)
            found[name] = _worst(both, self._normed(plain, residual), self._normed(exact, residual))
        return found

    def _linear(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Without and with adapters."""
        weight: Any = self._model.weights[f"{self._layer}.{name}"]
        plain = x.double() @ weight.tensor.double().T
        exact, starts = plain.clone(), weight.spec.starts
        for (slot, site, part), (a, b) in self._matrices.items():
            if site == weight.spec.site:
                mine = (self._slots == slot).nonzero()[:, 0]
                exact[mine, starts[part] : starts[part + 1]] += x[mine].double() @ a.T @ b.T
        return plain, exact

    def _turned(self, y: torch.Tensor, step: Step) -> torch.Tensor:
        shape, table, positions = self._model.shape, self._model.rope, step.tensor("positions")
        cos, sin = table.cos[positions][:, None].double(), table.sin[positions][:, None].double()
        heads = y.view(len(y), -1, shape.head_dim)
        low, high = heads[:, : shape.heads + shape.kv_heads].chunk(2, -1)
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        return torch.cat([turned, heads[:, shape.heads + shape.kv_heads :]], 1).view(len(y), -1)

    def _normed(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        total = y + residual.double()
        scale = (total.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return torch.cat([total * scale * self._model.norm.double(), total], 1)


def _activated(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _worst(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm(dim=1).max() / (exact - plain).norm(dim=1).mean())
