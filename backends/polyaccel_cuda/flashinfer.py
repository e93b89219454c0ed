"""Attention by FlashInfer's kernels, for those who have installed them and ask for them: what they take, and whether
they are there.

What they do not take is a reason in the plan where it is known at load; where it depends on the step, the kernels of
this backend do the call, and the ledger says so. It is their fa2 form alone, which is compiled when a shape is first
planned: the others differ in what they take from one GPU and one version to the next.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from polyaccel.backend import BackendUnavailable, Entry, Query, Reason

NAME = "flashinfer"
OLDEST, BEYOND = (0, 5), (0, 8)
"""Versions whose wrappers have been read: from the first, and below the second."""
EVIDENCE = ("*BatchPrefillWithPagedKVCacheKernel*", "*MergeStatesKernel*")
"""Decode on tensor cores is the prefill's kernel with one query a sequence; parts of a context are merged after."""
DTYPES = ("float16", "bfloat16")
HEADS = (64, 128, 256)
LARGEST_GROUP = 16
"""Query heads to a key head: parts of contexts are kept in float32 for each, 17 MiB of a head of 128 on an H100."""

_PLANNED = ("num_qo_heads", "num_kv_heads", "page_size", "sm_scale", "q_data_type", "kv_data_type")
_WRAPPERS = {
    "BatchDecodeWithPagedKVCacheWrapper": {
        "__init__": ("float_workspace_buffer", "kv_layout", "use_tensor_cores", "backend"),
        "plan": ("indptr", "indices", "last_page_len", "head_dim", *_PLANNED),
        "run": ("q", "paged_kv_cache", "out"),
    },
    "BatchPrefillWithPagedKVCacheWrapper": {
        "__init__": ("float_workspace_buffer", "kv_layout", "backend"),
        "plan": (
            "qo_indptr",
            "paged_kv_indptr",
            "paged_kv_indices",
            "paged_kv_last_page_len",
            "head_dim_qk",
            "causal",
            *_PLANNED,
        ),
        "run": ("q", "paged_kv_cache", "out"),
    },
}
"""By class and method, the arguments that are passed."""


@dataclass(frozen=True, slots=True)
class FlashInfer:
    """The package: its version, and what makes wrappers of decode and of prefill."""

    version: str
    decode: Callable[..., Any]
    prefill: Callable[..., Any]


def require() -> FlashInfer:
    """Import the package.

    Raises:
        BackendUnavailable: it is not there, or not as it is known here; says what to install.
    """
    cause: Exception | None = None
    try:
        module = importlib.import_module(NAME)
        missing = _unknown(module)
    except ModuleNotFoundError as error:
        missing = "flashinfer is not installed" if error.name == NAME else f"{type(error).__name__}: {error}"
        cause = error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        missing, cause = f"{type(error).__name__}: {error}", error
    if missing:
        first, beyond = (".".join(map(str, version)) for version in (OLDEST, BEYOND))
        raise BackendUnavailable(
            f"attention={NAME!r} was asked for, and {missing}; install flashinfer-python of a version from {first} and "
            f"below {beyond}, or leave attention at 'triton'"
        ) from cause
    decode, prefill = (getattr(module, name) for name in _WRAPPERS)
    return FlashInfer(str(module.__version__), decode, prefill)


def _unknown(module: ModuleType) -> str:
    """What is not as it is known here; empty if all is."""
    version = str(getattr(module, "__version__", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) < BEYOND:
        return f"flashinfer {version or 'of no version'} is there"
    for name, methods in _WRAPPERS.items():
        wrapper = getattr(module, name, None)
        if wrapper is None:
            return f"flashinfer {version} has no {name}"
        for method, arguments in methods.items():
            try:
                inspect.signature(getattr(wrapper, method)).bind_partial(None, **dict.fromkeys(arguments))
            except (TypeError, AttributeError) as error:
                return f"flashinfer {version}'s {name}.{method} differs from what is known: {error}"
    return ""


def refusals(query: Query) -> list[Reason]:
    """Why the kernels do not do a site's attention."""
    reasons, dtype = [], str(query.static.get("dtype", "")).removeprefix("torch.")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype or 'unknown'}; flashinfer takes {' and '.join(DTYPES)}")
    heads, kv_heads, head_dim = query.integer("heads", 1), query.integer("kv_heads", 1), query.integer("head_dim")
    if head_dim not in HEADS:
        reasons.append(f"heads of {head_dim}; flashinfer takes {', '.join(map(str, HEADS))}")
    if kv_heads and heads // kv_heads > LARGEST_GROUP:
        reasons.append(f"{heads // kv_heads} query heads to a key head; flashinfer's workspace is for {LARGEST_GROUP}")
    window, longest = query.static.get("window"), query.ranges.get("context")
    if isinstance(window, int) and (longest is None or longest[1] > window):
        # It weighs what lies before a window by zero, within a tile: NaN there would come through.
        than = "any context" if longest is None else f"the longest context, {longest[1]}"
        reasons.append(f"a window of {window}, shorter than {than}: flashinfer's kernels read what lies before it")
    return reasons


def before(entry: Entry, fn: Callable[..., object], version: str, announce: Callable[[Query], None]) -> Entry:
    """The entry with attention by the kernels, ``fn``, and with what those refuse beside its own reasons.

    ``announce``: told of the queries that are taken, so that steps can be planned for them as they begin.
    """

    def supports(query: Query) -> list[Reason]:
        reasons = [*entry.supports(query), *refusals(query)]
        if not reasons:
            announce(query)
        return reasons

    detail = f"by flashinfer {version}, in captured steps by own kernels"
    return replace(entry, fn=fn, supports=supports, evidence=(*entry.evidence, *EVIDENCE), detail=detail)
