"""Bugs planted in the models, such that tokens hardly change: a layer that is looked at by itself shows them, or
log-probabilities that rounding does not explain.

Each is a context manager that patches one method for the models built and run inside it, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from unittest import mock

import torch

from polyaccel.backend import RopeTable, Step, Weight
from polyaccel.models.attention import Attention
from polyaccel.models.block import HiddenStates
from polyaccel.models.lm_head import LMHead

LAYER = 2
"""The layer that is wrong."""


@contextmanager
def _forward(wrong: Callable[[Attention, torch.Tensor, torch.Tensor, Step], HiddenStates]) -> Iterator[None]:
    """The attention of one layer is run by ``wrong``, which may call it."""
    right = Attention.forward

    def forward(self: Attention, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        return (wrong if _is_wrong(self) else right)(self, x, residual, step)

    with mock.patch.object(Attention, "forward", forward):
        yield


def _is_wrong(attention: Attention) -> bool:
    return attention.targets()[0].layer == LAYER


@contextmanager
def _residual_late() -> Iterator[None]:
    """The residual is added after the norm instead of before it."""
    right = Attention.forward

    def late(self: Attention, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        normed, y = right(self, x, torch.zeros_like(residual), step)
        return normed, y + residual

    with _forward(late):
        yield


@contextmanager
def _residual_narrow() -> Iterator[None]:
    """The residual passes bfloat16."""
    right = Attention.forward

    def narrow(self: Attention, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        return right(self, x, _narrow(residual), step)

    with _forward(narrow):
        yield


@contextmanager
def _rope_shifted() -> Iterator[None]:
    """Every position is one ahead. Attention sees differences of positions, so that only the cache shows it."""
    attach = Attention.attach

    def wrong(
        self: Attention, weights: Mapping[str, Weight], vectors: Mapping[str, torch.Tensor], rope: RopeTable
    ) -> None:
        if _is_wrong(self):
            rope = replace(rope, cos=rope.cos.roll(-1, 0), sin=rope.sin.roll(-1, 0))
        attach(self, weights, vectors, rope)

    with mock.patch.object(Attention, "attach", wrong):
        yield


@contextmanager
def _other_eps() -> Iterator[None]:
    """The norm after the attention has an eps of 1e-6 instead of 1e-5."""
    right = Attention.forward

    def wrong(self: Attention, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        with mock.patch.object(self, "_eps", 1e-6):
            return right(self, x, residual, step)

    with _forward(wrong):
        yield


@contextmanager
def _window_wide() -> Iterator[None]:
    """Windows are a token too wide, and layers without one see nothing else."""
    right = Attention.forward

    def forward(self: Attention, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        window = None if self._window is None else self._window + 1
        with mock.patch.object(self, "_window", window):
            return right(self, x, residual, step)

    with mock.patch.object(Attention, "forward", forward):
        yield


@contextmanager
def edited_logits(edit: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Logits pass through ``edit``."""
    right = LMHead.forward

    def wrong(self: LMHead, x: torch.Tensor, step: Step) -> torch.Tensor:
        return edit(right(self, x, step))

    with mock.patch.object(LMHead, "forward", wrong):
        yield


def _narrow(values: torch.Tensor) -> torch.Tensor:
    """Through bfloat16, whatever the model's dtype."""
    return values.to(torch.bfloat16).to(values.dtype)


PLANTED_LAYERS: Mapping[str, Callable[[], AbstractContextManager[None]]] = MappingProxyType(
    {
        "engine.layer_residual_late": _residual_late,
        "engine.layer_residual_narrow": _residual_narrow,
        "engine.layer_rope_shifted": _rope_shifted,
        "engine.layer_other_eps": _other_eps,
        "engine.layer_window_wide": _window_wide,
        "engine.logits_narrow": lambda: edited_logits(_narrow),
    }
)

CONTROL = "engine.layer_residual_late"
"""What shows that a wrong layer is found."""
LOGITS = "engine.logits_narrow"
"""What shows that wrong log-probabilities are found."""
