"""Tensors on virtual devices: a host tensor behind the manners of device memory.

Views are made at once. Everything else waits in the current stream of the tensors' device, which torch's own operators
find by themselves; a copy to the host waits for that stream and for no other. Inside a kernel the operators run at
once, on memory of the kernel's device alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from polyaccel_conformance.simulated.factories import DEVICE_TYPE, device_of
from polyaccel_conformance.simulated.runtime import IllegalAccess, Memory, VirtualDevice, named
from polyaccel_conformance.simulated.stream import Task

_aten = torch.ops.aten
# What tells the host something about values: it has to wait.
_READS = frozenset(
    {
        _aten._local_scalar_dense.default,
        _aten.equal.default,
        _aten.is_nonzero.default,
        _aten.nonzero.default,
        _aten.masked_select.default,
        _aten.item.default,
    }
)
_LOCAL_VIEWS = frozenset({_aten._unsafe_view.default, _aten.detach.default, _aten.lift_fresh.default})


class VirtualTensor(torch.Tensor):
    """``host``: the bytes; ``memory``: whose they are. torch sees a tensor without storage ("meta"), so that nothing
    reads it behind the runtime's back; ``device`` names the virtual device, and the CPU to code inside of a kernel."""

    host: torch.Tensor
    memory: Memory

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.where:
            # As in __setitem__: torch would put the number where there is no storage.
            args = tuple(torch.tensor(part) if isinstance(part, int | float) else part for part in args)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory) -> VirtualTensor:
        made: VirtualTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),
        )
        made.host, made.memory = inner, memory
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        own = self.memory.device
        return torch.device("cpu") if own.runtime.kernel_device is not None else own.torch_device

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __setitem__(self, key: Any, value: Any) -> None:
        # torch would make a number a tensor on the device that it takes this one for, which has no storage.
        own = self.memory.device
        where, what = _inner(key), _inner(value)
        if own.runtime.kernel_device is not None:
            raw(self, own.runtime.kernel_device)[where] = what
            return
        host = self.host

        def write() -> None:
            host[where] = what

        own.runtime.submit(Task(kernel="index_put_", call=write), own.runtime.current_stream(own))

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"VirtualTensor({list(self.shape)}, {self.dtype}, simulated:{self.memory.device.index})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[VirtualTensor] = []
        _collect(args, tensors)
        _collect(tuple(kwargs.values()), tensors)
        runtime = tensors[0].memory.device.runtime
        kernel_device = runtime.kernel_device
        if kernel_device is not None:
            return _inside(func, args, kwargs, tensors, kernel_device)
        if func.is_view or func in _LOCAL_VIEWS:
            return _view(func, args, kwargs, tensors[0].memory)
        if func is _aten.copy_.default:
            return _copy(args[0], args[1])
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "meta":
            # What torch takes for this tensor's own device.
            target = kwargs["device"] = None
        if target is not None and torch.device(target).type == "cpu":
            return _download(func, args, kwargs, tensors[0])
        if target is not None and torch.device(target).type == DEVICE_TYPE:
            kwargs["device"] = None
            there = device_of(torch.device(target))
            if there is not tensors[0].memory.device:
                return _to_peer(tensors[0], there, kwargs.get("dtype"))
        return _queue(func, args, kwargs, tensors)


def empty_on(device: VirtualDevice, shape: Sequence[int], dtype: torch.dtype) -> VirtualTensor:
    """Memory full of what spoils every result it reaches; inside a graph, at every replay again."""
    device.runtime.refuse_if_lost(device)
    inner = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if not torch._C._len_torch_dispatch_stack():
        # Whoever watches has poisons of its own.
        poison_(inner)
    tensor = VirtualTensor(inner, Memory(device, inner.numel() * inner.element_size()))
    if device.runtime.capturing:
        runtime = device.runtime
        runtime.submit(
            Task(kernel="reuse", call=lambda: poison_(inner), kind="mark", duration=0.0),
            runtime.current_stream(device),
        )
    return tensor


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or with an index outside of everything."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(113) if tensor.dtype == torch.uint8 else tensor.fill_(torch.iinfo(tensor.dtype).min // 2)


def raw(tensor: torch.Tensor, device: VirtualDevice) -> torch.Tensor:
    """The bytes, for a kernel of ``device``.

    Raises:
        IllegalAccess: they are another device's.
    """
    if not isinstance(tensor, VirtualTensor):
        return tensor
    own = tensor.memory.device
    if own is not device:
        raise IllegalAccess(f"illegal memory access: memory of device {own.index} in a kernel on device {device.index}")
    return tensor.host


# -- operators ---------------------------------------------------------------------------------------------------------


def _inside(
    func: Any, args: Any, kwargs: dict[str, Any], tensors: Sequence[VirtualTensor], device: VirtualDevice
) -> Any:
    for tensor in tensors:
        raw(tensor, device)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*_inner(args), **_inner(kwargs))
    written = _written(func, args, kwargs)
    return written[0] if written and isinstance(result, torch.Tensor) else result


def _view(func: Any, args: Any, kwargs: Any, memory: Memory) -> Any:
    result = func(*_inner(args), **_inner(kwargs))
    if isinstance(result, torch.Tensor):
        return VirtualTensor(result, memory)
    return [VirtualTensor(part, memory) for part in result]


def _copy(destination: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if not isinstance(destination, VirtualTensor):
        assert isinstance(source, VirtualTensor)
        runtime, target, values = source.memory.device.runtime, destination, source.host
        stream = runtime.current_stream(source.memory.device)
        runtime.submit(Task(kernel="copy", call=lambda: target.copy_(values), kind="to host"), stream)
        runtime.wait_stream(stream)
        return destination
    device, inner = destination.memory.device, destination.host
    stream = device.runtime.current_stream(device)
    if not isinstance(source, VirtualTensor):
        if source.is_meta:
            raise RuntimeError("a tensor without storage is copied to a virtual device")
        # From pageable memory: the source may change as soon as this returns.
        values = source.detach().clone()
        device.runtime.submit(Task(kernel="copy", call=lambda: inner.copy_(values), kind="to device"), stream)
    elif source.memory.device is device:
        values = source.host
        device.runtime.submit(
            Task(
                kernel="copy",
                call=lambda: inner.copy_(values),
                kind="on device",
                operands=named((("destination", destination), ("source", source))),
            ),
            stream,
        )
    else:
        other = source.memory.device.runtime.current_stream(source.memory.device)
        device.runtime.stream_wait(stream, device.runtime.mark(other))
        values = source.host
        device.runtime.submit(Task(kernel="copy", call=lambda: inner.copy_(values), kind="between devices"), stream)
    return destination


def _download(func: Any, args: Any, kwargs: dict[str, Any], source: VirtualTensor) -> Any:
    """A new host tensor; waits for the source's current stream only."""
    runtime = source.memory.device.runtime
    stream, found = runtime.current_stream(source.memory.device), []
    inner_args, inner_kwargs = _inner(args), _inner(kwargs)

    def copy() -> None:
        result = func(*inner_args, **inner_kwargs)
        found.append(result.clone() if result is inner_args[0] else result)

    runtime.submit(Task(kernel="copy", call=copy, kind="to host"), stream)
    runtime.wait_stream(stream)
    return found[0]


def _to_peer(source: VirtualTensor, device: VirtualDevice, dtype: torch.dtype | None) -> torch.Tensor:
    made = empty_on(device, source.shape, dtype or source.dtype)
    return _copy(made, source)


def _queue(func: Any, args: Any, kwargs: dict[str, Any], tensors: Sequence[VirtualTensor]) -> Any:
    """One of torch's own operators, in the current stream of its tensors' device."""
    device = tensors[0].memory.device
    runtime = device.runtime
    for leaf in tree_flatten((args, kwargs))[0]:
        foreign = isinstance(leaf, VirtualTensor) and leaf.memory.device is not device
        on_host = isinstance(leaf, torch.Tensor) and not isinstance(leaf, VirtualTensor) and leaf.dim() > 0
        if foreign or on_host:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {tensors[0].device} and {leaf.device}"
            )
    stream = runtime.current_stream(device)
    inner_args, inner_kwargs = _inner(args), _inner(kwargs)
    infos = named([(f"operand {i}", tensor) for i, tensor in enumerate(tensors)])
    name = str(func.overloadpacket).removeprefix("aten.")
    if func in _READS:
        runtime.wait_stream(stream)
        result = func(*inner_args, **inner_kwargs)
        return tree_map_only(torch.Tensor, lambda t: VirtualTensor(t, Memory(device, t.nbytes)), result)
    written = _written(func, args, kwargs)
    if written:
        runtime.submit(Task(kernel=name, call=lambda: func(*inner_args, **inner_kwargs), operands=infos), stream)
        return written[0] if len(written) == 1 else tuple(written)
    outputs = _allocate_outputs(func, inner_args, inner_kwargs, device)
    leaves, structure = tree_flatten(outputs)
    targets = [leaf.host for leaf in leaves if isinstance(leaf, VirtualTensor)]

    def run() -> None:
        results = [t for t in tree_flatten(func(*inner_args, **inner_kwargs))[0] if isinstance(t, torch.Tensor)]
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)

    runtime.submit(Task(kernel=name, call=run, operands=infos), stream)
    return tree_unflatten(leaves, structure)


def _allocate_outputs(func: Any, args: Any, kwargs: Any, device: VirtualDevice) -> Any:
    """Shapes and strides are known without values."""

    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")

    shapes = func(*tree_map_only(torch.Tensor, on_meta, args), **tree_map_only(torch.Tensor, on_meta, kwargs))

    def allocate(shape: torch.Tensor) -> VirtualTensor:
        made = empty_on(device, (shape.numel(),), shape.dtype)
        dense = shape.is_contiguous() or shape.numel() == 0 or not _is_dense(shape)
        strides = torch.empty(shape.shape, device="meta").stride() if dense else shape.stride()
        return VirtualTensor(made.host.as_strided(shape.size(), strides), made.memory)

    return tree_map_only(torch.Tensor, allocate, shapes)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the strides are a permutation of the contiguous ones."""
    size = 1
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1 and stride != size:
            return False
        size *= n
    return True


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                found.append(value)
    return found


def _inner(value: Any) -> Any:
    """The host tensors behind virtual ones, in arguments that are tensors, lists and tuples of them, or anything else
    (torch's own tree functions cost more than most operators here)."""
    if isinstance(value, VirtualTensor):
        return value.host
    if isinstance(value, list | tuple):
        return type(value)([_inner(item) for item in value])
    if isinstance(value, dict):
        return {name: _inner(item) for name, item in value.items()}
    return value


def _collect(values: Any, found: list[VirtualTensor]) -> None:
    for value in values:
        if isinstance(value, VirtualTensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _collect(value, found)
