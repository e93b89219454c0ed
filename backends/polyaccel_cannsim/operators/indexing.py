"""Reading and writing by index: embedding, index_select, gather, index, index_put, scatter, scatter_nd_update.

"Embedding", "IndexSelect", "Gather", "Index", "IndexPut", "NdUpdate" below: the pages under hicann/ops-nn index/ that
each row names. Index values lie on the device: a wrong one is met when the kernel runs, never while a call is checked.
"""

from __future__ import annotations

import torch

from .descriptor import (
    ALL,
    FLOATS,
    INDICES,
    Tensor,
    broadcast,
    require,
    require_dtype,
    require_rank,
    require_same_dtype,
)
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import inner, invalid, null

_SCATTER_ND = (*FLOATS, torch.int64, torch.bool, torch.int8)  # NdUpdate, varRef: no INT32
_REDUCE_NONE, _REDUCE_ADD = 0, 1


def _types(environment: Environment, allowed: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    if environment.chip == CHIP_310P:
        return tuple(dtype for dtype in allowed if dtype != torch.bfloat16)
    return allowed


def _require_out(out: Tensor, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        raise invalid(f"Expected out to have shape {list(shape)}, but got {list(out.shape)}.")


def _dim(x: Tensor, dim: int) -> int:
    axes = max(len(x.shape), 1)
    if not -axes <= dim < axes:
        raise invalid(f"dim {dim} is out of range [{-axes}, {axes - 1}].")
    return dim % axes


def _in_range(name: str, index: torch.Tensor, size: int, *, negative: bool = False) -> torch.Tensor:
    """The indices as int64, refused on the device where one is outside 0..size-1 (or -size..size-1)."""
    values = index.to(torch.int64)
    low = -size if negative else 0
    if values.numel() and (int(values.min()) < low or int(values.max()) >= size):
        raise inner(f"{name} has values from {int(values.min())} to {int(values.max())}, outside [{low}, {size - 1}].")
    return values


@aclnn(
    "aclnnEmbedding", "3*tensor", serves="embedding", document="hicann/ops-nn index/embedding/docs/aclnnEmbedding.md"
)
def embedding(environment: Environment, weight: Tensor, indices: Tensor, out: Tensor) -> Compute:
    """out [..., n] = weight [rows, n] at indices [...]. Embedding: an index past the end gives "random values"."""
    require(weight=weight, indices=indices, out=out)
    require_dtype("weight", weight, _types(environment, ALL))
    require_dtype("indices", indices, INDICES)
    require_same_dtype(weight=weight, out=out)
    require_rank("weight", weight, 2, 2)
    _require_out(out, (*indices.shape, weight.shape[1]))

    def compute() -> None:
        rows = _in_range("indices", indices.view(), weight.shape[0])
        out.view().copy_(weight.view()[rows])

    return compute


@aclnn(
    "aclnnIndexSelect",
    "tensor int64 2*tensor",
    serves="index_select",
    document="hicann/ops-nn index/gather_v2/docs/aclnnIndexSelect.md",
)
def index_select(environment: Environment, x: Tensor, dim: int, index: Tensor, out: Tensor) -> Compute:
    """out = x at index [n] along `dim`."""
    require(self=x, index=index, out=out)
    require_dtype("self", x, _types(environment, ALL))
    require_dtype("index", index, INDICES)
    require_rank("index", index, 0, 1)
    axis = _dim(x, dim)
    shape = list(x.shape)
    if shape:
        shape[axis] = index.shape[0] if index.shape else 1
    _require_out(out, tuple(shape))

    def compute() -> None:
        chosen = _in_range("index", index.view().reshape(-1), x.shape[axis] if x.shape else 1)
        out.view().copy_(x.view().index_select(axis, chosen))

    return compute


@aclnn(
    "aclnnGather",
    "tensor int64 2*tensor",
    serves="gather",
    document="hicann/ops-nn index/gather_elements_v2/docs/aclnnGather.md",
)
def gather(environment: Environment, x: Tensor, dim: int, index: Tensor, out: Tensor) -> Compute:
    """out[i][j][k] = x[index[i][j][k]][j][k] for dim 0, and so on."""
    require(self=x, index=index, out=out)
    require_dtype("self", x, _types(environment, ALL))
    require_dtype("index", index, INDICES)
    axis = _dim(x, dim)
    if len(index.shape) != len(x.shape) or any(
        a > b for i, (a, b) in enumerate(zip(index.shape, x.shape, strict=True)) if i != axis
    ):
        raise invalid(f"index of shape {list(index.shape)} does not fit self of shape {list(x.shape)}.")
    _require_out(out, index.shape)

    def compute() -> None:
        chosen = _in_range("index", index.view(), x.shape[axis] if x.shape else 1)
        out.view().copy_(torch.gather(x.view(), axis, chosen))

    return compute


def _index_list(x: Tensor, indices: tuple[Tensor, ...] | None) -> list[Tensor | None]:
    """The indices, None for an axis taken whole: torch_npu hands over an empty tensor for it."""
    if not indices:
        raise null("indices")
    if len(indices) > len(x.shape):
        raise invalid(f"{len(indices)} indices for the {len(x.shape)} dimensions of self.")
    chosen = [None if index.shape == (0,) else index for index in indices]
    for i, index in enumerate(chosen):
        require_dtype(f"indices[{i}]", index, (*INDICES, torch.bool))
    return chosen


def _where(x: Tensor, chosen: list[Tensor | None]) -> list[torch.Tensor | None]:
    """The indices as torch takes them, refused on the device where one is out of range."""
    found: list[torch.Tensor | None] = []
    axis = 0
    for index in chosen:
        if index is None:
            found.append(None)
            axis += 1
        elif index.dtype == torch.bool:
            found.append(index.view())
            axis += len(index.shape)
        else:
            found.append(_in_range("indices", index.view(), x.shape[axis], negative=True))
            axis += 1
    return found


@aclnn("aclnnIndex", "tensor tensors tensor", serves="index", document="hicann/ops-nn index/index/docs/aclnnIndex.md")
def index(environment: Environment, x: Tensor, indices: tuple[Tensor, ...], out: Tensor) -> Compute:
    """x[indices]: the indices broadcast against each other."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, ALL))
    require_same_dtype(self=x, out=out)
    chosen = _index_list(x, indices)

    def compute() -> None:
        found = torch.ops.aten.index(x.view(), _where(x, chosen))
        if found.shape != out.view().shape:
            raise inner(f"out has shape {list(out.shape)}, but the indices give {list(found.shape)}.")
        out.view().copy_(found)

    return compute


@aclnn(
    "aclnnIndexPutImpl",
    "tensor tensors tensor 2*bool",
    serves="index_put_",
    document="hicann/ops-nn index/index_put_v2/docs/aclnnIndexPutImpl.md",
)
def index_put(
    environment: Environment,
    x: Tensor,
    indices: tuple[Tensor, ...],
    values: Tensor,
    accumulate: bool,
    unsafe: bool,
) -> Compute:
    """x[indices] = values, or += where `accumulate`."""
    require(selfRef=x, values=values)
    require_dtype("selfRef", x, _types(environment, ALL))
    require_same_dtype(selfRef=x, values=values)
    chosen = _index_list(x, indices)

    def compute() -> None:
        target, where = x.view(), _where(x, chosen)
        if accumulate and target.dtype in (torch.float16, torch.bfloat16):
            wide = target.to(torch.float32)
            torch.ops.aten.index_put_(wide, where, values.view().to(torch.float32), True)
            target.copy_(wide)
        else:
            torch.ops.aten.index_put_(target, where, values.view(), accumulate)

    return compute


@aclnn(
    "aclnnScatterNdUpdate",
    "3*tensor",
    serves="npu_scatter_nd_update, npu_scatter_nd_update_",
    document="hicann/ops-nn index/scatter_nd_update/docs/aclnnScatterNdUpdate.md",
)
def scatter_nd_update(environment: Environment, target: Tensor, indices: Tensor, updates: Tensor) -> Compute:
    """target[indices[i]] = updates[i]. indices: [..., a], updates: [..., *target.shape[a:]]."""
    require(varRef=target, indices=indices, updates=updates)
    require_dtype("varRef", target, _types(environment, _SCATTER_ND))
    require_dtype("indices", indices, INDICES)
    require_same_dtype(varRef=target, updates=updates)
    require_rank("varRef", target, 1, 8)
    require_rank("indices", indices, 2, 8)  # NdUpdate, constraints: at least 2-D
    width = indices.shape[-1]
    if not 1 <= width <= min(7, len(target.shape)):
        raise invalid(f"the last axis of indices must be 1 to {min(7, len(target.shape))}, but is {width}.")
    shape = (*indices.shape[:-1], *target.shape[width:])
    if updates.shape != shape:
        raise invalid(f"Expected updates to have shape {list(shape)}, but got {list(updates.shape)}.")

    def compute() -> None:
        rows = indices.view().reshape(-1, width)
        where = tuple(
            _in_range(f"indices[..., {i}]", column, target.shape[i]) for i, column in enumerate(rows.unbind(1))
        )
        target.view().index_put_(where, updates.view().reshape(-1, *target.shape[width:]))

    return compute


def _check_scatter(environment: Environment, x: Tensor, dim: int, index: Tensor, reduce: int) -> int:
    require(self=x, index=index)
    require_dtype("self", x, _types(environment, ALL))
    require_dtype("index", index, INDICES)
    if reduce not in (_REDUCE_NONE, _REDUCE_ADD, 2):
        raise invalid(f"reduce must be 0, 1 or 2, but is {reduce}.")
    if reduce != _REDUCE_NONE:
        raise inner(f"cannsim does not simulate reduce {reduce} of aclnnScatter")
    return _dim(x, dim)


_SCATTER = "hicann/ops-nn index/scatter_elements_v2/docs/aclnnScatter&aclnnInplaceScatter.md"
_SCATTER_VALUE = "hicann/ops-nn index/scatter_elements_v2/docs/aclnnScatterValue&aclnnInplaceScatterValue.md"


@aclnn("aclnnInplaceScatter", "tensor int64 2*tensor int64", serves="scatter_", document=_SCATTER)
def inplace_scatter(
    environment: Environment, x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: int
) -> Compute:
    """x[index[i][j]][j] = source[i][j] for dim 0, and so on."""
    axis = _check_scatter(environment, x, dim, index, reduce)
    require(src=source)
    require_same_dtype(self=x, src=source)

    def compute() -> None:
        x.view().scatter_(axis, _in_range("index", index.view(), x.shape[axis]), source.view())

    return compute


@aclnn("aclnnScatter", "tensor int64 2*tensor int64 tensor", serves="scatter", document=_SCATTER)
def scatter(
    environment: Environment, x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: int, out: Tensor
) -> Compute:
    """The same into a copy of x."""
    axis = _check_scatter(environment, x, dim, index, reduce)
    require(src=source, out=out)
    require_same_dtype(self=x, src=source, out=out)
    _require_out(out, x.shape)

    def compute() -> None:
        out.view().copy_(x.view().scatter(axis, _in_range("index", index.view(), x.shape[axis]), source.view()))

    return compute


@aclnn(
    "aclnnInplaceScatterValue",
    "tensor int64 tensor number int64",
    serves="scatter_ of a number",
    document=_SCATTER_VALUE,
)
def inplace_scatter_value(
    environment: Environment, x: Tensor, dim: int, index: Tensor, value: float, reduce: int
) -> Compute:
    """x[index[i][j]][j] = value for dim 0, and so on."""
    axis = _check_scatter(environment, x, dim, index, reduce)

    def compute() -> None:
        x.view().scatter_(axis, _in_range("index", index.view(), x.shape[axis]), value)

    return compute


@aclnn(
    "aclnnIndexAdd",
    "tensor int64 2*tensor number tensor",
    serves="index_add, index_add_",
    document="hicann/ops-nn index/inplace_scatter_add/docs/aclnnIndexAdd.md",
)
def index_add(
    environment: Environment, x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float, out: Tensor
) -> Compute:
    """out = x with alpha * source added at index along `dim`; sums in float32, one rounding. out may be x."""
    require(self=x, index=index, source=source, out=out)
    require_dtype("self", x, _types(environment, ALL))
    require_dtype("index", index, INDICES)
    require_same_dtype(self=x, source=source, out=out)
    axis = _dim(x, dim)
    expected = list(x.shape)
    expected[axis] = index.shape[0] if index.shape else 1
    broadcast(source.shape, expected)
    _require_out(out, x.shape)

    def compute() -> None:
        chosen = _in_range("index", index.view().reshape(-1), x.shape[axis])
        values = x.view()
        kind = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
        out.view().copy_(values.to(kind).index_add(axis, chosen, source.view().to(kind), alpha=alpha))

    return compute


OPERATORS = (
    embedding,
    index_select,
    gather,
    index,
    index_put,
    scatter_nd_update,
    inplace_scatter,
    scatter,
    inplace_scatter_value,
    index_add,
)
