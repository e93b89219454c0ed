"""Calls torch_npu's operators on simulated cards and prints, as JSON, which aclnn functions each one ended in.

``python -m tests.cannsim_operators.served``; results are compared with the same operators on the CPU where both exist.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import polyaccel_cannsim


def main() -> None:
    polyaccel_cannsim.install(devices=1)
    import torch_npu

    ledger = polyaccel_cannsim.current().ledger
    generator = torch.Generator().manual_seed(0)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    def card(value: Any) -> Any:
        return value.npu() if isinstance(value, torch.Tensor) else value

    x, weight, gamma, index = half(4, 64), half(8, 64), half(64), torch.tensor([2, 0])
    groups, experts = torch.tensor([1, 4]), half(2, 64, 8)
    causal = torch.ones(2048, 2048).triu(1).bool()
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    query, keys = half(1, 3, 4 * 64), half(2, 128, 2 * 64)
    options: dict[str, Any] = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.125, "input_layout": "BSH"}
    both: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "linear": (torch.nn.functional.linear, (x, weight)),
        "linear with a bias": (torch.nn.functional.linear, (x, weight, half(8))),
        "bmm": (torch.bmm, (half(2, 3, 4), half(2, 4, 5))),
        "embedding": (torch.nn.functional.embedding, (index, x)),
        "index": (lambda t, i: t[:, i], (x, index)),
        "silu": (torch.nn.functional.silu, (x,)),
        "softmax": (lambda t: t.float().softmax(-1), (x,)),
        "argmax": (lambda t: t.argmax(-1), (x,)),
        "topk": (lambda t: t.topk(3).values, (x,)),
        "sort": (lambda t: t.sort(-1).values, (x,)),
        "cumsum": (lambda t: t.float().cumsum(-1), (x,)),
        "where": (lambda t: torch.where(t > 0, t, t * 2 + 1), (x,)),
        "cat": (lambda t: torch.cat([t, t]), (x,)),
        "strided copy": (lambda t: t.t().contiguous(), (x,)),
        "layer norm": (lambda t, g: torch.nn.functional.layer_norm(t, (64,), g, g), (x, gamma)),
    }
    only: dict[str, Callable[[], Any]] = {
        "npu_rms_norm": lambda: torch_npu.npu_rms_norm(x.npu(), gamma.npu()),
        "npu_add_rms_norm": lambda: torch_npu.npu_add_rms_norm(x.npu(), x.npu(), gamma.npu()),
        "npu_swiglu": lambda: torch_npu.npu_swiglu(x.npu()),
        "npu_rotary_mul": lambda: torch_npu.npu_rotary_mul(
            half(1, 4, 2, 64).npu(), half(1, 4, 1, 64).npu(), half(1, 4, 1, 64).npu()
        ),
        "npu_apply_rotary_pos_emb": lambda: torch_npu.npu_apply_rotary_pos_emb(
            half(1, 4, 2, 64).npu(), half(1, 4, 1, 64).npu(), half(1, 4, 1, 64).npu(), half(1, 4, 1, 64).npu(), "BSND"
        ),
        "npu_scatter_pa_kv_cache": lambda: torch_npu.npu_scatter_pa_kv_cache(
            *(half(2, 3, 64).npu(), half(2, 3, 64).npu(), half(4, 16, 3, 64).npu(), half(4, 16, 3, 64).npu()),
            index.int().npu(),
            cache_mode="Norm",
        ),
        "npu_scatter_nd_update_": lambda: torch_npu.npu_scatter_nd_update_(
            x.npu(), index[:, None].npu(), half(2, 64).npu()
        ),
        "npu_grouped_matmul": lambda: torch_npu.npu_grouped_matmul(
            *([x.npu()], [experts.npu()]), group_list=groups.npu(), split_item=3, group_type=0, group_list_type=0
        ),
        "prefill": lambda: torch_npu.npu_fused_infer_attention_score(
            *(query.npu(), keys.npu(), keys.npu()),
            **options,
            atten_mask=causal.npu(),
            block_table=table.npu(),
            block_size=128,
            actual_seq_lengths=[3],
            actual_seq_lengths_kv=[200],
            sparse_mode=3,
        ),
        "decode": lambda: torch_npu.npu_fused_infer_attention_score(
            *(query[:, :1].contiguous().npu(), keys.npu(), keys.npu()),
            **options,
            block_table=table.npu(),
            block_size=128,
            actual_seq_lengths_kv=[200],
        ),
    }
    report: dict[str, Any] = {}

    def note(name: str, run: Callable[[], Any]) -> Any:
        before = len(list(ledger))
        result = run()
        torch.npu.synchronize()
        report[name] = {"calls": [call.name for call in list(ledger)[before:]]}
        return result

    for name, (function, arguments) in both.items():
        moved = tuple(card(one) for one in arguments)
        found = note(name, lambda function=function, moved=moved: function(*moved))  # type: ignore[misc]
        wanted = function(*(one.double() if one.is_floating_point() else one for one in arguments))
        report[name]["error"] = float((found.cpu().double() - wanted.double()).abs().max())
    for name, call in only.items():
        note(name, call)
    try:
        torch_npu.npu_swiglu(x.npu()[:, ::2])
        torch.npu.synchronize()
    except RuntimeError as refusal:
        report["refusal"] = str(refusal)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
