"""polyaccel: an LLM inference engine whose hardware is a plugin, with proof that the plugin is right.

Public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyaccel.backend.errors import (
        AdapterError,
        AdapterIncompatible,
        AdapterNotFound,
        BackendError,
        BackendUnavailable,
        CommunicationError,
        ConfigurationError,
        DeviceLost,
        EngineDead,
        ModelError,
        ModelLoadError,
        ModelNotFound,
        OperatorError,
        OutOfMemory,
        PolyaccelError,
        RequestAborted,
        RequestError,
        RequestRejected,
        RequestTooLong,
        UnsupportedError,
        WorkerError,
    )
    from polyaccel.backend.registry import BackendStatus, list_backends
    from polyaccel.engine.async_llm import AsyncLLM
    from polyaccel.engine.explanation import Explanation, Health
    from polyaccel.engine.llm import LLM
    from polyaccel.engine.outputs import Completion, Delta, Timing, TokenLogprob
    from polyaccel.engine.sampling_params import SamplingParams
    from polyaccel.lora.receipt import AdapterReceipt

__version__ = "0.1.0"

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def _let_torch_be_imported() -> None:
    """Keep torch from importing torch_npu where CANN is missing, which would make ``import torch`` itself fail.

    Holds for this process and those that it starts. Does nothing if torch is imported already, or if the variable is
    set: that is the user's choice.
    """
    if "torch" in sys.modules or _AUTOLOAD in os.environ:
        return
    # PathFinder, for other finders may answer a mere question by changing how the package is imported.
    if importlib.machinery.PathFinder.find_spec("torch_npu") is None:
        return
    import ctypes

    try:
        # What torch_npu links against first; where it is there, torch is about to load it anyway.
        ctypes.CDLL("libhccl.so")
    except OSError:
        os.environ[_AUTOLOAD] = "0"


_let_torch_be_imported()

_HOMES = {
    "polyaccel.backend.errors": (
        "AdapterError",
        "AdapterIncompatible",
        "AdapterNotFound",
        "BackendError",
        "BackendUnavailable",
        "CommunicationError",
        "ConfigurationError",
        "DeviceLost",
        "EngineDead",
        "ModelError",
        "ModelLoadError",
        "ModelNotFound",
        "OperatorError",
        "OutOfMemory",
        "PolyaccelError",
        "RequestAborted",
        "RequestError",
        "RequestRejected",
        "RequestTooLong",
        "UnsupportedError",
        "WorkerError",
    ),
    "polyaccel.backend.registry": ("BackendStatus", "list_backends"),
    "polyaccel.engine.async_llm": ("AsyncLLM",),
    "polyaccel.engine.explanation": ("Explanation", "Health"),
    "polyaccel.engine.llm": ("LLM",),
    "polyaccel.engine.outputs": ("Completion", "Delta", "Timing", "TokenLogprob"),
    "polyaccel.engine.sampling_params": ("SamplingParams",),
    "polyaccel.lora.receipt": ("AdapterReceipt",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AdapterError",
    "AdapterIncompatible",
    "AdapterNotFound",
    "AdapterReceipt",
    "AsyncLLM",
    "BackendError",
    "BackendStatus",
    "BackendUnavailable",
    "CommunicationError",
    "Completion",
    "ConfigurationError",
    "Delta",
    "DeviceLost",
    "EngineDead",
    "Explanation",
    "Health",
    "ModelError",
    "ModelLoadError",
    "ModelNotFound",
    "OperatorError",
    "OutOfMemory",
    "PolyaccelError",
    "RequestAborted",
    "RequestError",
    "RequestRejected",
    "RequestTooLong",
    "SamplingParams",
    "Timing",
    "TokenLogprob",
    "UnsupportedError",
    "WorkerError",
    "__version__",
    "list_backends",
]


def __getattr__(name: str) -> object:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'polyaccel' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
