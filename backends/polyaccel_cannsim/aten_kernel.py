"""One aten operator of the card on CPU views: queued on the stream, noted in the ledger, ready to be captured."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .aten import Allowed, Kind
from .descriptor import DTYPES, ND, AclTensor
from .ledger import Call

if TYPE_CHECKING:
    from .simulator import Simulator

_ACL = {dtype: code for code, dtype in DTYPES.items()}
_CPU, _META = torch.device("cpu"), torch.device("meta")
_SHAPES_KEPT = 512
"""Results' shapes that one operator remembers; asking torch for them costs more than the rest of a call."""

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def describe(tensor: torch.Tensor) -> AclTensor:
    """The descriptor of a tensor of the card, as an aclnn function would receive it."""
    offset, dtype = int(tensor.storage_offset()), tensor.dtype
    address = tensor.data_ptr() - offset * dtype.itemsize
    assert tensor.device.index is not None
    return AclTensor(address, _ACL[dtype], tuple(tensor.shape), tensor.stride(), offset, (), ND, tensor.device.index)


class AtenKernel:
    """What runs instead of torch_npu's own kernel.

    Raises when called:
        RuntimeError: operands on several devices, in torch's words; or the stream refused the work.
    """

    def __init__(self, simulator: Simulator, operator: Any, allowed: Allowed) -> None:
        self._simulator = simulator
        self._operator = operator
        self._allowed = allowed
        arguments = operator._schema.arguments
        self._written = [
            (i, one.name) for i, one in enumerate(arguments) if one.alias_info is not None and one.alias_info.is_write
        ]
        self._takes_device = any(one.name == "device" for one in arguments)
        # Only on a machine with torch_npu are there ``torch.npu`` and this module.
        npu: Any = importlib.import_module("torch_npu")
        self._npu = npu.npu
        self._raw_stream = npu._C._npu_getCurrentRawStream
        self._layouts: dict[Any, tuple[list[Layout], type | None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        operands: list[AclTensor] = []
        key: list[Any] = []
        plain = [self._take(one, operands, key) for one in args]
        named = {}
        for name, one in kwargs.items():
            key.append(name)
            named[name] = self._take(one, operands, key)
        index = operands[0].device if operands else self._device_index(kwargs.get("device"))
        simulator, name, operator = self._simulator, self._allowed.name, self._operator

        def on_cpu() -> Any:
            values = {word: _on(one, AclTensor.tensor, _CPU) for word, one in named.items()}
            return operator(*[_on(one, AclTensor.tensor, _CPU) for one in plain], **values)

        if self._npu.current_device() != index:
            # Asking for a card's stream empties torch_npu's own queue of the card that is current, whichever is asked.
            with self._npu.device(index):
                return self(*args, **kwargs)
        if self._allowed.kind is Kind.READS:
            self._npu.current_stream(index).synchronize()
            simulator.ledger.add(Call(name, tuple(operands), index))
            return _each(on_cpu(), lambda one: one.to(torch.device("npu", index)))
        # Asking for the handle empties torch_npu's own queue first: launches keep the order of calls.
        stream = self._raw_stream(index)
        if self._written:
            self._queue(stream, on_cpu, Call(name, tuple(operands), index))
            found = [args[i] if i < len(args) else kwargs[word] for i, word in self._written]
            return found[0] if len(found) == 1 else tuple(found)
        layouts, structure = self._result(plain, named, key)
        device = torch.device("npu", index)
        outs = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in layouts]
        targets = [describe(one) for one in outs]

        def compute() -> None:
            result = on_cpu()
            for target, one in zip(targets, [result] if structure is None else result, strict=True):
                target.tensor().copy_(one)

        self._queue(stream, compute, Call(name, (*operands, *targets), index))
        return outs[0] if structure is None else structure(outs)

    def _queue(self, stream: int, compute: Callable[[], Any], call: Call) -> None:
        code = self._simulator.enqueue(stream, compute, call)
        if code:
            raise RuntimeError(f"cannsim: {call.name} could not be queued: runtime error {code}")

    def _take(self, value: Any, operands: list[AclTensor], key: list[Any]) -> Any:
        """The value with descriptors in the card's tensors' places; notes what the result's shape may depend on."""
        if isinstance(value, torch.Tensor):
            if value.device.type == "npu":
                one = describe(value)
                if operands and operands[0].device != one.device:
                    raise self._several(f"npu:{operands[0].device}", f"npu:{one.device}")
                operands.append(one)
                key.append((one.shape, one.stride, one.acl_dtype))
                return one
            if value.dim():
                raise self._several("npu", str(value.device))
            key.append(("0-d", value.dtype))
            return value.clone()  # the caller may change it before the stream runs
        if isinstance(value, (list, tuple)):
            key.append(len(value))
            return [self._take(one, operands, key) for one in value]
        key.append((type(value), value))
        return value

    def _device_index(self, device: Any) -> int:
        if isinstance(device, torch.device) and device.index is not None:
            return device.index
        return int(self._npu.current_device())

    def _several(self, one: str, other: str) -> RuntimeError:
        return RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {one} and {other}! "
            f"({self._allowed.name})"
        )

    def _result(self, plain: list[Any], named: dict[str, Any], key: list[Any]) -> tuple[list[Layout], type | None]:
        """Layouts of the results, and what they are handed back in; None for a single tensor."""
        token = tuple(key)
        known = self._layouts.get(token)
        if known is not None:
            return known
        values = {word: _on(one, _empty, _META) for word, one in named.items()}
        if self._takes_device:
            values["device"] = _META
        result = self._operator(*[_on(one, _empty, _META) for one in plain], **values)
        single = isinstance(result, torch.Tensor)
        found = [result] if single else list(result)
        if not all(isinstance(one, torch.Tensor) for one in found):
            raise NotImplementedError(f"cannsim: {self._allowed.name} returns something that is no tensor")
        out = [(tuple(one.shape), one.stride(), one.dtype) for one in found], None if single else type(result)
        if len(self._layouts) < _SHAPES_KEPT:
            self._layouts[token] = out
        return out


def _empty(one: AclTensor) -> torch.Tensor:
    return torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device=_META)


def _on(value: Any, make: Callable[[AclTensor], torch.Tensor], device: torch.device) -> Any:
    if isinstance(value, AclTensor):
        return make(value)
    if isinstance(value, list):
        return [_on(one, make, device) for one in value]
    return device if isinstance(value, torch.device) else value


def _each(result: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(result, torch.Tensor):
        return change(result)
    return tuple(_each(one, change) for one in result) if isinstance(result, (list, tuple)) else result
