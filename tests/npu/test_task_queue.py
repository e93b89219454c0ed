"""torch_npu's task queue: on the caller's thread, on one of its own, or with the checks on that one as well.

The setting is read when torch_npu is imported, so that each has processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.npu.tiny import write

SETTINGS = ("0", "1", "2")
ASYNCHRONOUS = ("1", "2")
DECODE = """
import json, sys
import torch_npu
from polyaccel import LLM, SamplingParams

print("SETTING", torch_npu._C._npu_get_task_queue_enable())
prompts = [[5, 9, 3], [7] * 20, [11, 2, 50, 4]]
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
for name, graphs in (("EAGER", False), ("GRAPHS", True)):
    with LLM(sys.argv[1], backend="npu", dtype="float16", max_model_len=256, max_num_seqs=4, kv_cache_bytes=16 << 20,
             executor="inline", graphs=graphs) as llm:
        ids = [list(one.token_ids) for one in llm.generate(prompts, params)]
        counts = llm.explain().ranks[0]["graphs"]
    print(name, json.dumps([ids, counts["captures"] if counts else 0]))
"""
FAILING = """
import time
import torch
from polyaccel.backend import DeviceLost, OperatorError
from polyaccel_npu import runtime
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.replay import group_of_one

backend = NpuBackend(blame=True)
device = backend.devices()[0]
group, hcom = group_of_one(device.torch_device)
issue, ops = backend._issuer.issue, runtime.ops()
norm = backend.table()["rms_norm"][0].fn
ones, gamma = device.upload(torch.ones(2, 8)), device.upload(torch.ones(8))
x, w = device.upload(torch.ones(8, 4).half()), device.upload(torch.ones(16, 8).half())
calls = {
    "strided": lambda: issue(
        "mm_all_reduce_base", {"x1": x.t(), "x2": w.t()}, ops.npu_mm_all_reduce_base, x.t(), w.t(), hcom
    ),
    "dtype": lambda: issue(
        "swiglu", {"x": ones.int()}, ops.npu_swiglu, ones.int(), -1
    ),
}
norm(ones, gamma, 1e-5)
try:
    calls["%s"]()
    # A call that torch_npu adds in the very moment of the failure may stay in its queue, and waits are for ever then.
    time.sleep(0.5)
    %s
    device.synchronize()
except (DeviceLost, OperatorError) as error:
    print("FOUND", type(error).__name__, str(error).replace(chr(10), " | "))
try:
    print("AFTER", norm(ones, gamma, 1e-5).cpu().tolist())
except DeviceLost as error:
    print("AFTER", type(error).__name__)
"""
LATER = {"call": "norm(ones, gamma, 1e-5)", "event": "device.record()", "wait": "pass"}
"""Who comes upon the failure: each adds to the queue or waits for it."""

PATIENCE = 200
# A child that waits for ever shows where before it is ended.
SAYS_WHERE = f"import faulthandler; faulthandler.dump_traceback_later({PATIENCE - 30})\n"


def failing(call: str, later: str = "call") -> str:
    return FAILING % (call, LATER[later])


def run(script: str, setting: str, *arguments: str) -> dict[str, str]:
    """What the script printed, by first word."""
    environment = {**os.environ, "TASK_QUEUE_ENABLE": setting}
    environment.pop("ASCEND_LAUNCH_BLOCKING", None)
    try:
        child = subprocess.run(
            [sys.executable, "-c", SAYS_WHERE + script, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as hung:
        print((hung.stderr or b"").decode())
        raise
    assert child.returncode == 0, child.stderr[-3000:]
    return dict(line.partition(" ")[::2] for line in child.stdout.splitlines())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny"))


@cache
def told(model: Path, setting: str) -> dict[str, str]:
    return run(DECODE, setting, str(model))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_decodes_to_the_same_tokens_under_every_setting(setting: str, model: Path) -> None:
    assert told(model, setting)["SETTING"] == setting
    default, _ = json.loads(told(model, "1")["EAGER"])
    assert [len(ids) for ids in default] == [12] * 3
    assert len({tuple(ids) for ids in default}) == 3, "prompts that are answered alike say little"
    ids, captures = json.loads(told(model, setting)["EAGER"])
    assert (ids, captures) == (default, 0)
    ids, captures = json.loads(told(model, setting)["GRAPHS"])
    assert ids == default
    # torch_npu refuses a capture under 2: the engine runs on, call by call.
    assert (captures > 0) == (setting != "2")


@pytest.mark.parametrize(
    ("setting", "later"), [*((one, "call") for one in ASYNCHRONOUS), ("1", "event"), ("1", "wait")]
)
def test_a_failure_on_the_queue_is_told_with_its_operator_and_operands_and_no_numbers_follow(
    setting: str, later: str
) -> None:
    told = run(failing("strided", later), setting)
    assert told["FOUND"].startswith("DeviceLost")
    assert "aclnnMatmulAllReduce" in told["FOUND"]
    assert "npu.mm_all_reduce_base" in told["FOUND"]
    assert "float16[4, 8] stride [1, 4] on npu:0, non-contiguous" in told["FOUND"]
    assert told["AFTER"] == "DeviceLost"


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_refused_type_is_told_with_its_operands_however_late_it_is_found(setting: str) -> None:
    """Under 2 the checks of phase 1 are on the queue's thread as well."""
    told = run(failing("dtype"), setting)
    assert told["FOUND"].startswith("DeviceLost" if setting == "2" else "OperatorError")
    assert "aclnnSwiGlu" in told["FOUND"]
    assert "npu.swiglu" in told["FOUND"]
    assert "int32[2, 8]" in told["FOUND"]
    assert told["AFTER"] == "DeviceLost" if setting == "2" else told["AFTER"].startswith("[[")


def test_without_the_queue_a_failure_is_told_at_its_call_and_later_calls_are_right() -> None:
    told = run(failing("strided"), "0")
    assert told["FOUND"].startswith("OperatorError")
    assert "float16[4, 8] stride [1, 4] on npu:0, non-contiguous" in told["FOUND"]
    assert told["AFTER"].startswith("[[0.99999")
