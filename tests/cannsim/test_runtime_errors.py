"""How failures reach a program: each in a process of its own, since an asynchronous one poisons its process."""

from __future__ import annotations

from typing import Any

import pytest

RULES = {"CANNSIM_RULES": "tests.cannsim.rules"}
STRIDED = """
    import torch, torch_npu
    x, w = torch.randn(8, 4).half().npu(), torch.randn(8, 16).half().npu()
    torch.npu.synchronize()
    try:
        torch_npu.npu_mm_all_reduce_base(x.t(), w, "group")
        print("returned")
        torch.npu.synchronize()
    except RuntimeError as problem:
        print("raised", problem)
    """


@pytest.mark.parametrize(("queue", "late"), [("0", False), ("1", True)])
def test_what_phase_2_refuses_is_raised_where_the_task_queue_says(program: Any, queue: str, late: bool) -> None:
    """With a queue it is raised by whatever asks the queue next: the synchronisation, or the end of the call itself."""
    out = program(STRIDED, **RULES, TASK_QUEUE_ENABLE=queue)
    assert late or "returned" not in out
    assert "call aclnnMatmulAllReduce failed, error code is 561000" in out
    assert "ERR00100 PTA call acl api failed" in out
    assert "Op MatmulAllReduce has 1 uncontiguous input" in out
    assert ("the current working operator name is aclnnMatmulAllReduce" in out) == late


def test_launch_blocking_raises_at_the_call_and_later_calls_are_right(program: Any) -> None:
    later = "\n    print(torch_npu.npu_mm_all_reduce_base(w.t().contiguous(), w, 'g').cpu().shape)\n"
    out = program(STRIDED + later, **RULES, ASCEND_LAUNCH_BLOCKING="1")
    assert "returned" not in out
    assert "torch.Size([16, 16])" in out


def test_a_device_failure_is_raised_at_the_synchronisation_and_stays(program: Any) -> None:
    out = program(
        """
        import torch, torch_npu
        x = torch.randn(4, 8).half().npu()
        torch.npu.synchronize()
        torch_npu.npu_swiglu(x)
        print("returned")
        for _ in range(2):
            try:
                torch.npu.current_stream().synchronize()
            except RuntimeError as problem:
                print("raised", problem)
        """,
        status=0,
        **RULES,
    )
    assert out.index("returned") < out.index("raised")
    assert out.count("507015") >= 2
    assert "SwiGlu: The aicore execution is abnormal" in out


def test_memory_beyond_the_card_is_torch_npus_own_error(program: Any) -> None:
    out = program(
        """
        import torch
        torch.empty(4 << 20, dtype=torch.uint8, device="npu")
        try:
            torch.empty(200 << 20, dtype=torch.uint8, device="npu")
        except torch.OutOfMemoryError as problem:
            print("refused:", problem)
        """,
        **RULES,
        CANNSIM_MEMORY="100M",
    )
    assert "refused: NPU out of memory" in out


def test_what_is_not_simulated_names_the_function_that_is_missing(program: Any) -> None:
    out = program(
        """
        import torch
        try:
            torch.sinh(torch.ones(2, device="npu"))
            torch.npu.synchronize()
        except RuntimeError as problem:
            print("refused:", problem)
        """,
        **RULES,
        TASK_QUEUE_ENABLE="0",
    )
    assert "aclnn function looked for in vain: aclnnSinh" in out


@pytest.mark.parametrize(("cann", "name"), [("8.1.RC1", "aten::silu"), ("8.3.RC1", "aclnnSilu")])
def test_the_cann_version_decides_what_torch_npu_calls(program: Any, cann: str, name: str) -> None:
    out = program(
        """
        import torch, polyaccel_cannsim
        torch.nn.functional.silu(torch.ones(2, device="npu")).cpu()
        print(polyaccel_cannsim.current().ledger.names())
        """,
        **RULES,
        CANNSIM_CANN=cann,
    )
    assert name in out
