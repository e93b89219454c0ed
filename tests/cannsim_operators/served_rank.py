"""One rank of two on the real torch_npu: a fused product with x3, collectives, then the founding failure.

``RANK=0 python -m tests.cannsim_operators.served_rank FILE``; FILE is where the ranks meet. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

import polyaccel_cannsim

RANKS = 2


def main() -> None:
    rank = int(os.environ["RANK"])
    polyaccel_cannsim.install(devices=RANKS)
    import torch_npu

    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=RANKS)
    summed = torch.full((3,), rank + 1.0).npu()
    dist.all_reduce(summed)
    name = dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank)  # type: ignore[union-attr]
    x = [torch.randn(5, 64, generator=torch.Generator().manual_seed(r)).half() for r in range(RANKS)]
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(9)).half()
    delta = torch.full((5, 32), rank + 1.0).half()
    y = torch_npu.npu_mm_all_reduce_base(x[rank].npu(), weight.npu().t(), name, x3=delta.npu())
    wanted = (x[0].double() + x[1].double()) @ weight.double().T + 3
    report = {
        "sum": summed.tolist(),
        "error": float((y.cpu().double() - wanted).abs().max() / wanted.abs().max()),
        "names": sorted({call.name for call in polyaccel_cannsim.current().ledger}),
        "refusal": "",
        "at": "",
    }
    try:
        report["at"] = "call"
        torch_npu.npu_mm_all_reduce_base(x[rank].npu()[:, ::2], weight.npu()[:, ::2].t().contiguous(), name)
        report["at"] = "synchronisation"
        torch.npu.synchronize()
    except RuntimeError as refusal:
        report["refusal"] = str(refusal)
    print(json.dumps(report), flush=True)
    os._exit(0)  # the queue is poisoned now: tearing the group down would wait for it


if __name__ == "__main__":
    main()
