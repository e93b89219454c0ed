"""One layer of transformers' Mistral with PEFT's adapters, one token, as it runs without a server around it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch
from cuda_model import Shape
from turns import in_turns, present

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALLOWED = 0.01
"""Of what the adapter changes, if it is added to the weights instead."""


def peft_row(shape: Shape, rank: int, repeats: int) -> dict[str, object]:
    """Milliseconds of one layer and the last norm, with an adapter on all seven linear layers and without.

    Raises:
        SystemExit: the layer with an adapter merged into it says something else.
    """
    row: dict[str, object] = {"what": "peft", "kernels": "transformers and peft, eager, one layer", "batch": 1}
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "peft")):
        return {**row, "version": "not installed"}
    import peft
    import transformers

    device = torch.device("cuda" if present() else "cpu")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=64,
        pad_token_id=None,
    )
    plain: Any = transformers.MistralModel(config).to(device, torch.bfloat16).eval()
    adapted: Any = transformers.MistralModel(config).to(device, torch.bfloat16).eval()
    adapted.load_state_dict(plain.state_dict())
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    adapted = peft.get_peft_model(adapted, lora, autocast_adapter_dtype=False).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * (0.25 if "lora_B" in name else 1))
    x = torch.randn(1, 1, shape.hidden, device=device, dtype=torch.bfloat16)

    def run(model: Any) -> torch.Tensor:
        out: torch.Tensor = model(inputs_embeds=x, use_cache=False).last_hidden_state
        return out

    with torch.inference_mode():
        times = in_turns({"none": lambda: lambda: run(plain), "one": lambda: lambda: run(adapted)}, repeats)
        # In float32, where merging rounds next to nothing.
        x, plain, adapted = x.float(), plain.float(), adapted.float()
        without, found = run(plain), run(adapted)
        adapted.merge_adapter()
        error = float((run(adapted) - found).norm() / (found - without).norm())
    if not error <= ALLOWED:
        raise SystemExit(f"peft: the adapter merged says something else: {error}")
    added = times["one"] - times["none"]
    row |= {"rank": rank, "ms": round(times["one"], 4), "base_ms": round(times["none"], 4)}
    row |= {"added_ms": round(added, 4), "added": f"{added / times['none']:.1%}", "merged_differs": round(error, 6)}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    return {**row, "version": versions}
