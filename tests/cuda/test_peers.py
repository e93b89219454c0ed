"""The benchmarks' check of a layer against float64, and how they read a peer's kernels. The peer is a stand-in."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.project.source import ROOT

SLOTS, RANK, CONTEXT = 3, 4, 6
FILES = {
    "utils": """
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import next_power_of_2
from vllm.utils.torch_utils import async_tensor_h2d

init_logger(__name__).warning_once("tuned for nothing")
assert not envs.VLLM_BATCH_INVARIANT and envs.VLLM_TUNED_CONFIG_FOLDER is None
assert current_platform.is_cuda() in (True, False) and not current_platform.has_device_capability(1000)
assert [next_power_of_2(n) for n in (1, 2, 3, 32, 33)] == [1, 2, 4, 32, 64]
_LORA_A_PTR_DICT = {1: async_tensor_h2d([1, 2], dtype=__import__("torch").uint64, device="cpu")}
_LORA_B_PTR_DICT = {1: 2}
""",
    "lora_shrink_op": """
from vllm.lora.ops.triton_ops.utils import envs
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op

def _shrink(x, a, h, slots, scale):
    for i, slices in enumerate(a):
        h[i] = scale * (slices[slots.long()].float() @ x.float()[:, :, None])[..., 0]

try:
    direct_register_custom_op(op_name="lora_shrink", op_func=_shrink)
    lora_shrink = None
except AttributeError:
    lora_shrink = _shrink
""",
    "lora_expand_op": """
def lora_expand(h, b, y, slots, offset_start, add_inputs):
    assert add_inputs
    for i, slices in enumerate(b):
        n = slices.shape[1]
        delta = (slices[slots.long()].float() @ h[i][:, :, None])[..., 0]
        y[:, offset_start : offset_start + n] += delta.to(y.dtype)
        offset_start += n
""",
    "lora_kernel_metadata": """
class LoRAKernelMeta:
    @staticmethod
    def make(max_loras, max_num_tokens, device):
        return LoRAKernelMeta()

    def prepare_tensors(self, mapping):
        self.mapping = mapping

    def meta_args(self, tokens, specialize_active_lora):
        assert specialize_active_lora
        return (self.mapping[:tokens],)
""",
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("cuda_model", "peer_stations", "sides", "station_errors", "vllm_lora")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    package = tmp_path / "vllm" / "lora" / "ops" / "triton_ops"
    package.mkdir(parents=True)
    for name, text in FILES.items():
        (package / f"{name}.py").write_text(text)
    (tmp_path / "vllm-9.8.7.dist-info").mkdir()
    return tmp_path


@pytest.fixture
def model(modules: Any) -> Iterator[Any]:
    from tests.backends.interpreted.backend import InterpretedBackend

    shape = modules.cuda_model.Shape(hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=48, vocabulary=20, layers=2)
    sizes = {"rank_rows": SLOTS * RANK * 2, "slots": SLOTS, "rows": 4, "context": CONTEXT}
    made = modules.cuda_model.Model(shape, **sizes, backend=InterpretedBackend(), dtype=torch.float16)
    yield made
    made.backend.close()


def test_both_sides_of_a_comparison_are_right_and_another_adapter_is_seen(
    modules: Any, model: Any, folder: Path
) -> None:
    lora = modules.vllm_lora.load(folder)
    sides = modules.sides.Sides(model, lora, rank=RANK)
    named = [1, 0, 1, 2]
    reference = modules.station_errors.Reference(model, 1, named, RANK)
    allowed = modules.station_errors.ALLOWED
    for stations, slots in ((model, named), (sides.stations(named), None)):
        errors = reference.errors(stations, model.step(4, slots))
        assert set(errors) == {"qkv", "gate_up", "o", "down"}
        assert max(errors.values()) < allowed
    wrong = [1, 0, 1, 1]
    for stations, slots in ((model, wrong), (sides.stations(wrong), None), (sides.stations(None), None)):
        errors = reference.errors(stations, model.step(4, slots))
        assert min(errors.values()) > 10 * allowed
    assert sides.checked(named, lambda: model.step(4, named), lambda: model.step(4, None)).keys() == {
        "polyaccel",
        "vllm",
    }
    with pytest.raises(SystemExit, match="polyaccel is wrong"):
        sides.checked(named, lambda: model.step(4, wrong), lambda: model.step(4, None))


def test_a_model_takes_adapters_of_another_rank_after_the_first(modules: Any, model: Any) -> None:
    modules.sides.Sides(model, None, rank=RANK).close()
    sides = modules.sides.Sides(model, None, rank=2 * RANK)
    assert [where.rank_rows for where in model.store.ranges()] == [2 * RANK] * SLOTS
    assert sides.stations([0]) is None


def test_a_peer_is_read_from_its_folder_and_leaves_no_module(modules: Any, folder: Path) -> None:
    mine = object()
    sys.modules["vllm"] = mine  # type: ignore[assignment]
    try:
        lora = modules.vllm_lora.load(folder)
        assert {name for name in sys.modules if name.partition(".")[0] == "vllm"} == {"vllm"}
        assert sys.modules["vllm"] is mine
    finally:
        del sys.modules["vllm"]
    assert lora.version == "9.8.7"
    assert lora._utils._LORA_A_PTR_DICT
    lora.forget()
    assert not lora._utils._LORA_A_PTR_DICT
    assert not lora._utils._LORA_B_PTR_DICT


def test_a_peer_that_is_not_there_is_none(modules: Any, tmp_path: Path) -> None:
    assert modules.vllm_lora.load(None) is None
    assert modules.vllm_lora.load(tmp_path) is None
