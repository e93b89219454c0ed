"""Sequences in a paged cache of any backend, and their attention in float64. Slots of nobody hold NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from polyaccel.backend import Backend, DeviceState, KVCache, KVSpec, Plan, SiteRequest, Step, StepInput
from polyaccel.backend.plan import Site
from polyaccel_conformance.problems.steps import Paging, build_step
from polyaccel_conformance.words import Source

LAYERS = 2


@dataclass
class PagedStep:
    """``queries``: tokens of each sequence, the last ones of ``contexts``. Layer 1 holds the keys."""

    backend: Backend
    queries: Sequence[int]
    contexts: Sequence[int]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    scale: float = 0.125
    window: int | None = None
    seed: int = 0
    decode: bool = False
    longest: int = 0
    """The longest context that the plan is asked about; 0: that of the step."""
    site: Site = field(init=False)
    kv: KVCache = field(init=False)
    q: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        device, size = self.backend.devices()[0], self.backend.kv_block_size()
        source = Source(self.seed)
        paging = Paging.of(source, self.queries, self.contexts, size)
        static = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "scale": self.scale,
            "window": self.window,
        }
        ranges = {"context": (1, self.longest or max(self.contexts))}
        self.plan = Plan(
            self.backend, [SiteRequest(site="a", operator="paged_attention", static=static, ranges=ranges)]
        )
        self.site = self.plan["a"]
        spec = KVSpec(
            layers=LAYERS,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            blocks=paging.blocks,
            block_size=size,
        )
        self.kv = self.backend.allocate_kv(spec, device)
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(rows, heads, self.head_dim, generator=generator).to(self.dtype)

        everything = torch.arange(paging.blocks * size)
        nothing = torch.full((len(everything), self.kv_heads, self.head_dim), torch.nan, dtype=self.dtype)
        self.keys = [(drawn(n, self.kv_heads), drawn(n, self.kv_heads)) for n in self.contexts]
        for slots, k, v in (
            (everything, nothing, nothing),
            *((torch.from_numpy(paging.slots(i, 0, len(k))), k, v) for i, (k, v) in enumerate(self.keys)),
        ):
            self.kv.write(1, device.upload(slots), device.upload(k), device.upload(v))
        self.host_q = drawn(sum(self.queries), self.heads)
        self.q = device.upload(self.host_q)
        self.input: StepInput = build_step(
            source, self.queries, contexts=self.contexts, paging=paging, decode=self.decode
        )

    def begin(self) -> Step:
        return self.backend.begin_step(self.input, DeviceState(kv=self.kv), self.backend.devices()[0])

    def attend(self, step: Step | None = None, q: torch.Tensor | None = None) -> torch.Tensor:
        """By what the plan says, as a model calls it."""
        own = self.begin() if step is None else step
        result = self.site[own](self.q if q is None else q, self.kv, 1, own, self.scale, self.window)
        assert isinstance(result, torch.Tensor)
        return result.cpu()

    @property
    def reasons(self) -> tuple[str, ...]:
        return self.site.planned[0].reasons

    def wanted(self) -> torch.Tensor:
        parts, starts = [], [0, *torch.tensor(list(self.queries)).cumsum(0).tolist()]
        for (begin, end), (k, v), context in zip(pairwise(starts), self.keys, self.contexts, strict=True):
            group = self.heads // self.kv_heads
            keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", self.host_q[begin:end].double(), keys) * self.scale
            last, at = torch.arange(context - (end - begin), context)[:, None], torch.arange(context)
            hidden = at > last
            if self.window is not None:
                hidden |= at <= last - self.window
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(parts)

    def off(self, result: torch.Tensor) -> float:
        """The largest error, in roundings of the type's numbers near 1."""
        error = (result.double() - self.wanted()).abs().max() / torch.finfo(self.dtype).eps
        return float(error) if bool(torch.isfinite(result).all()) else float("inf")
