"""Llama 2 and 3, Mistral, Qwen2 / 2.5 and Qwen3: one structure, told apart by the configuration.

Biases of q, k and v (Qwen2), norms of each head of q and k (Qwen3), sliding windows (Mistral) and scaled rotary
frequencies (Llama 3.1) are switches of the shared blocks.
"""

from __future__ import annotations

from polyaccel.backend.device import Device
from polyaccel.models.block import FeedForward
from polyaccel.models.decoder import DecoderModel
from polyaccel.models.gated_mlp import GatedMLP


class LlamaModel(DecoderModel):
    """The Llama family: every feed-forward is a gated MLP."""

    def build_feed_forward(self, layer: int, device: Device, next_norm: str) -> FeedForward:
        return GatedMLP(self.shard, device, layer=layer, next_norm=next_norm)
