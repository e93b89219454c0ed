"""vLLM's LoRA kernels as a peer, read from the files of an unpacked wheel; vLLM is neither installed nor imported.

    python -m pip download --no-deps vllm==0.33.0
    unzip vllm-*.whl 'vllm/lora/ops/triton_ops/*' 'vllm-*.dist-info/WHEEL' -d FOLDER

What the files import of the rest of vLLM is replaced while they are read by stand-ins that say what vLLM says by
default: no tuned configurations, sums of split products by atomics, one stream.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PACKAGE = "vllm.lora.ops.triton_ops"
Rows = tuple[torch.Tensor, ...]
"""Which row has which adapter, as the kernels take it."""


class VllmLora:
    """The kernels of one folder.

    Attributes:
        version: of the wheel, as far as its folder says.
    """

    def __init__(self, folder: Path) -> None:
        with _stand_ins(folder):
            self._utils = importlib.import_module(f"{PACKAGE}.utils")
            self._shrink: Any = importlib.import_module(f"{PACKAGE}.lora_shrink_op").lora_shrink
            self._expand: Any = importlib.import_module(f"{PACKAGE}.lora_expand_op").lora_expand
            self._meta: Any = importlib.import_module(f"{PACKAGE}.lora_kernel_metadata").LoRAKernelMeta
        found = [path.name.split("-")[1].removesuffix(".dist") for path in folder.glob("vllm-*.dist-info")]
        self.version = found[0] if found else "unknown"

    def rows(self, slots: Sequence[int], device: torch.device) -> Rows:
        """``slots``: of each row. The launches are as wide as the adapters that are named, which vLLM does only
        if it is told to: by default they are as wide as the adapters that may be loaded."""
        mapping = torch.tensor(list(slots), dtype=torch.int32, device=device)
        meta = self._meta.make(max(slots) + 1, len(slots), device)
        meta.prepare_tensors(mapping)
        arranged: Rows = meta.meta_args(len(slots), True)
        return arranged

    def add(
        self, y: torch.Tensor, x: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], rows: Rows
    ) -> None:
        """``y += x A B``, slices side by side in y; of each ``a: [slots, rank, k]`` and ``b: [slots, n, rank]``."""
        h = torch.empty((len(a), x.shape[0], a[0].shape[1]), dtype=torch.float32, device=x.device)
        self._shrink(x, list(a), h, *rows, 1.0)
        self._expand(h, list(b), y, *rows, offset_start=0, add_inputs=True)

    def forget(self) -> None:
        """Drop what is kept of matrices by their address: others may come to lie there."""
        self._utils._LORA_A_PTR_DICT.clear()
        self._utils._LORA_B_PTR_DICT.clear()


def load(folder: Path | None) -> VllmLora | None:
    """The kernels below ``folder``, which holds ``vllm/lora/ops/triton_ops``; None if they are not there."""
    if folder is None or not folder.joinpath(*PACKAGE.split("."), "lora_shrink_op.py").exists():
        return None
    return VllmLora(folder)


class _Platform:
    """What vLLM calls the current platform."""

    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def is_device_capability(self, capability: int) -> bool:
        return self._capability() == capability

    def has_device_capability(self, capability: int) -> bool:
        return self._capability() >= capability

    def _capability(self) -> int:
        if not self.is_cuda():
            return 0
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor


class _Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _no_registration(*args: object, **kwargs: object) -> None:
    # The files then take their plain functions.
    raise AttributeError("operators are not registered")


def _uploaded(data: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(data, dtype=dtype, device=device)


@contextmanager
def _stand_ins(folder: Path) -> Iterator[None]:
    """Modules under vLLM's names; afterwards nobody finds them, nor the ones that were read."""
    import triton
    import triton.language

    variables = SimpleNamespace(
        VLLM_BATCH_INVARIANT=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
    )
    contents: dict[str, dict[str, object]] = {
        "vllm": {"envs": variables},
        "vllm.logger": {"init_logger": lambda name: _Silent()},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"tl": triton.language, "triton": triton},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"next_power_of_2": lambda n: 1 << max(0, n - 1).bit_length()},
        "vllm.utils.torch_utils": {
            "direct_register_custom_op": _no_registration,
            "async_tensor_h2d": _uploaded,
        },
        "vllm.lora": {},
        "vllm.lora.ops": {},
        PACKAGE: {"__path__": [str(folder.joinpath(*PACKAGE.split(".")))]},
    }
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update({"__path__": [], **content})
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(before)
