"""The real torch_npu on the table: which functions its operators end in, and that what comes back is right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TASK_QUEUE_ENABLE": "1"}
    command = [sys.executable, "-m", "tests.cannsim_operators.served"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        ("linear", "aclnnMatmul"),
        ("linear with a bias", "aclnnAddmm"),
        ("bmm", "aclnnBatchMatMul"),
        ("embedding", "aclnnEmbedding"),
        ("index", "aclnnIndex"),
        ("silu", "aclnnSilu"),
        ("softmax", "aclnnSoftmax"),
        ("argmax", "aclnnArgMax"),
        ("topk", "aclnnTopk"),
        ("sort", "aclnnSort"),
        ("cumsum", "aclnnCumsum"),
        ("where", "aclnnSWhere"),
        ("cat", "aclnnCat"),
        ("strided copy", "aclnnInplaceCopy"),
        ("layer norm", "aclnnLayerNorm"),
        ("npu_rms_norm", "aclnnRmsNorm"),
        ("npu_add_rms_norm", "aclnnAddRmsNorm"),
        ("npu_swiglu", "aclnnSwiGlu"),
        ("npu_rotary_mul", "aclnnRotaryPositionEmbedding"),
        ("npu_apply_rotary_pos_emb", "aclnnApplyRotaryPosEmbV2"),
        ("npu_scatter_pa_kv_cache", "aclnnScatterPaKvCache"),
        ("npu_scatter_nd_update_", "aclnnScatterNdUpdate"),
        ("npu_grouped_matmul", "aclnnGroupedMatmulV5"),
        ("prefill", "aclnnFusedInferAttentionScoreV3"),
        ("decode", "aclnnFusedInferAttentionScoreV3"),
    ],
)
def test_an_operator_of_torch_npu_ends_in_its_simulated_function(
    report: dict[str, Any], operator: str, function: str
) -> None:
    assert function in report[operator]["calls"]
    assert not [name for name in report[operator]["calls"] if name.startswith("aten::")]
    assert report[operator].get("error", 0.0) < 0.05


def test_a_refusal_reaches_the_caller_in_the_words_of_torch_npu_and_cann(report: dict[str, Any]) -> None:
    assert "call aclnnSwiGlu failed, error code is 161002" in report["refusal"]
    assert "non-contiguous" in report["refusal"]


def test_the_founding_failure_comes_back_asynchronously_on_two_ranks(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {
        "PYTHONPATH": path,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TASK_QUEUE_ENABLE": "1",
        "CANNSIM_HCCL_FOLDER": str(tmp_path / "hccl"),
    }
    command = [sys.executable, "-m", "tests.cannsim_operators.served_rank", str(tmp_path / "meet")]
    ranks = [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for child in ranks:
            out, log = child.communicate(timeout=120)
            assert child.returncode == 0, log[-3000:]
            report = json.loads(out.strip().splitlines()[-1])
            assert report["sum"] == [3.0, 3.0, 3.0]
            assert report["error"] < 1e-3
            assert {"HcclAllReduce", "aclnnMatmulAllReduceV2"} <= set(report["names"])
            assert report["at"] == "synchronisation"
            assert "the current working operator name is aclnnMatmulAllReduce" in report["refusal"]
            assert "ASCEND_LAUNCH_BLOCKING" in report["refusal"]
            assert "has 1 uncontiguous input" in log + report["refusal"]
    finally:
        for child in ranks:
            child.kill()
