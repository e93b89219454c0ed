"""A stand-in for FlashInfer: its wrappers' documented arguments, checked, and the arithmetic in plain torch.

As those it reads pages from the device when it runs, and everything else from what was planned last. What is beyond the
documents, where kernels read what is not theirs or wait for the device, raises.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

VERSION = "0.6.4"
HEADS = (64, 128, 256)
CALLS: Counter[str] = Counter()
"""Plans and runs so far, by name, and ``constants`` copied to a device by runs; tests clear it."""
KEPT: set[int] = set()
"""Head counts whose constants have been copied."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"beyond what flashinfer documents: {what}")


class _Wrapper:
    kind = ""

    def _prepare(self, workspace: torch.Tensor, kv_layout: str, backend: str) -> None:
        require(workspace.dtype == torch.uint8 and workspace.dim() == 1, "a workspace of bytes")
        require(workspace.data_ptr() % 16 == 0 and not bool(workspace.any()), "a workspace of zeros, aligned")
        require(kv_layout in ("HND", "NHD") and backend in ("auto", "fa2", "fa3"), f"{kv_layout}, {backend}")
        self._workspace, self._layout = workspace, kv_layout
        self._planned: dict[str, Any] | None = None

    def _plan(
        self, queries: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, filled: torch.Tensor, **given: Any
    ) -> None:
        CALLS[f"{self.kind}.plan"] += 1
        for name, x in {"qo_indptr": queries, "indptr": indptr, "last_page_len": filled}.items():
            require(x.dtype == torch.int32 and x.dim() == 1 and x.is_contiguous(), f"{name} of {x.dtype}")
            require(x.device.type == "cpu", f"{name} on {x.device}, which the host would wait for")
        require(indices.dtype == torch.int32 and indices.device == self._workspace.device, "page indices")
        require(len(queries) == len(indptr) == len(filled) + 1 > 1, "as many sequences everywhere")
        for name, x in {"qo_indptr": queries, "indptr": indptr}.items():
            require(int(x[0]) == 0 and bool((x.diff() > 0).all()), f"{name} {x.tolist()}")
        require(len(indices) == int(indptr[-1]), f"{len(indices)} pages, {int(indptr[-1])} in indptr")
        require(bool(((filled >= 1) & (filled <= given["page_size"])).all()), f"last pages of {filled.tolist()}")
        lengths = (indptr.diff() - 1) * given["page_size"] + filled
        require(bool((lengths >= queries.diff()).all()), "more queries than keys")
        heads, kv_heads = given["num_qo_heads"], given["num_kv_heads"]
        require(heads % kv_heads == 0 and given["head_dim"] in HEADS, f"{heads}, {kv_heads} heads of {given}")
        require(given["q_data_type"] == given["kv_data_type"], "one type")
        require(given["q_data_type"] in (torch.float16, torch.bfloat16), f"{given['q_data_type']}")
        require(isinstance(given["sm_scale"], float), "the scale")
        parts = 4 * heads // kv_heads * 2 * 128 * (given["head_dim"] + 1)
        require(self._workspace.numel() >= parts, f"a workspace of {self._workspace.numel()} bytes for {parts}")
        self._planned = given | {
            "queries": queries.tolist(),
            "indptr": indptr.tolist(),
            "indices": indices,
            "lengths": lengths.tolist(),
        }

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        CALLS[f"{self.kind}.run"] += 1
        given = self._planned
        assert given is not None, "plan first"
        keys, values = paged_kv_cache
        heads, kv_heads, dim = given["num_qo_heads"], given["num_kv_heads"], given["head_dim"]
        CALLS["constants"] += heads not in KEPT
        KEPT.add(heads)
        require(q.shape == (given["queries"][-1], heads, dim), f"q {tuple(q.shape)}")
        require(q.dtype == given["q_data_type"] and keys.dtype == values.dtype == given["kv_data_type"], "types")
        require({q.device, keys.device, values.device} == {self._workspace.device}, "one device")
        require(q.stride(2) == 1 and q.data_ptr() % 16 == 0, "heads that vectors can be read from")
        require(all(step * q.element_size() % 16 == 0 for step in q.stride()[:2]), f"strides {q.stride()}")
        require(keys.stride() == values.stride() and keys.stride(3) == 1, "keys and values of the same strides")
        if self._layout == "NHD":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        require(tuple(keys.shape[1:]) == (kv_heads, given["page_size"], dim), f"pages {tuple(keys.shape)}")
        result = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        require(result.shape == q.shape and result.dtype == q.dtype and result.is_contiguous(), "out")
        pages = given["indices"].long()
        rows, places = pairwise(given["queries"]), pairwise(given["indptr"])
        for (begin, end), (first, last), length in zip(rows, places, given["lengths"], strict=True):
            k, v = (
                x[pages[first:last]].transpose(1, 2).reshape(-1, kv_heads, dim)[:length].double()
                for x in (keys, values)
            )
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[begin:end].double(), k) * given["sm_scale"]
            index = torch.arange(length - (end - begin), length, device=q.device)
            unseen = torch.arange(length, device=q.device) > index[:, None]
            weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
            result[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
        return result


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    kind = "decode"

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        backend: str = "auto",
    ) -> None:
        require(not use_cuda_graph, "graphs need buffers")
        self._cores = use_tensor_cores
        self._prepare(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        require(self._cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 8), "groups on plain cores")
        given = {name: value for name, value in locals().items() if name not in ("self", "indptr", "indices")}
        del given["last_page_len"]
        self._plan(torch.arange(len(indptr), dtype=torch.int32), indptr, indices, last_page_len, **given)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    kind = "prefill"

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        backend: str = "auto",
    ) -> None:
        require(not use_cuda_graph, "graphs need buffers")
        self._prepare(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        require(causal, "a prefill that sees what comes after")
        self._plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            sm_scale=sm_scale,
        )


def module(version: str = VERSION) -> ModuleType:
    """The package, as an import finds it."""
    found = ModuleType("flashinfer")
    found.__dict__.update(
        __version__=version,
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    )
    return found


def install(patch: pytest.MonkeyPatch, version: str = VERSION) -> None:
    import sys

    patch.setitem(sys.modules, "flashinfer", module(version))
    CALLS.clear()
    KEPT.clear()
