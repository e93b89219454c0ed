"""aclnnGroupedMatmulV4 and V5: one product a group of rows, every group with a weight of its own.

"GMM" below: Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_grouped_matmul.md, section "constraints",
table of scenes for a group_list that is a Tensor. C signature: hicann/ops-transformer
gmm/grouped_matmul/op_host/op_api/aclnn_grouped_matmul_v4.h and _v5.h. Only float types are simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .descriptor import FLOATS, Tensor, is_contiguous, is_transposed, require_dtype, require_plain, wide
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import NotSimulated, inner, invalid, null

GMM = "Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_grouped_matmul.md"

_MAX_LIST = 128  # GMM, x and weight: lists of at most 128 tensors
_MAX_GROUPS = 1024  # GMM, single x, single weight, single y: at most 1024 groups
_INNER_LIMIT = 65536  # GMM: the last axis of x and of weight is smaller than this
_NONE, _ROWS, _INNER = -1, 0, 2
_CUMULATIVE, _SIZES, _SPARSE = 0, 1, 2
_ALIGN_N_310P = 16  # GMM, 310P: n is a multiple of 16

_BIAS = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}
"""GMM, table 2, rows without quantisation: the type of the bias for each type of x."""

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Call:
    x: Tensors
    weight: Tensors
    bias: Tensors
    group_list: Tensor | None
    split_item: int
    group_type: int
    group_list_type: int
    out: Tensors

    @property
    def groups(self) -> int:
        """Weights in the call: a list's length, or the first axis of a single 3-D weight."""
        single = len(self.weight) == 1 and len(self.weight[0].shape) == 3
        return self.weight[0].shape[0] if single else len(self.weight)


def _check_types(environment: Environment, call: _Call) -> None:
    # GMM, tables 2 and 3: x, weight and y alike; on 310P FLOAT16 only; FLOAT32 only with single tensors.
    kind = call.x[0].dtype
    allowed = (torch.float16,) if environment.chip == CHIP_310P else FLOATS
    require_dtype("x, weight or out [0]", call.x[0], allowed)
    for i, tensor in enumerate((*call.x, *call.weight, *call.out)):
        require_plain(tensor=tensor)
        if tensor.dtype != kind:
            require_dtype(f"x, weight or out [{i}]", tensor, allowed)
            raise invalid(
                f"x, weight and y must have one dtype without quantisation, but got {kind} and {tensor.dtype}."
            )
    if kind == torch.float32 and max(len(call.x), len(call.weight), len(call.out)) > 1:
        raise invalid("FLOAT32 is only supported when x, weight and y are all single tensors.")
    if call.bias and len(call.bias) != len(call.weight):
        raise invalid(f"bias must have as many tensors as weight: {len(call.bias)} and {len(call.weight)}.")
    for i, tensor in enumerate(call.bias):
        require_dtype(f"bias[{i}]", tensor, (_BIAS[kind],))


def _check_layouts(call: _Call) -> None:
    turned_x, turned = [is_transposed(x) for x in call.x], [is_transposed(weight) for weight in call.weight]
    if any(turned_x) and call.group_type != _INNER:
        raise invalid(f"x[{turned_x.index(True)}] must not be transposed when groupType is {call.group_type}.")
    if any(turned) and not all(turned):
        raise invalid("either all tensors of weight are transposed or none is.")
    for i, weight in enumerate(call.weight):
        if not turned[i] and not is_contiguous(weight):
            raise invalid(f"weight[{i}] must be contiguous or transposed, but has stride {list(weight.stride)}.")
    for name, tensors, kinds in (("x", call.x, turned_x), ("weight", call.weight, turned)):
        for i, tensor in enumerate(tensors):
            last = tensor.shape[-2 if kinds[i] else -1]
            if last >= _INNER_LIMIT:
                raise invalid(f"the last axis of {name}[{i}] must be less than {_INNER_LIMIT}, but is {last}.")


def _check_scene(environment: Environment, call: _Call) -> None:
    many_x, many_weight, many_out = (len(tensors) > 1 for tensors in (call.x, call.weight, call.out))
    for name, tensors in (("x", call.x), ("weight", call.weight)):
        if not 0 < len(tensors) <= _MAX_LIST:
            raise invalid(f"{name} must hold 1 to {_MAX_LIST} tensors, but holds {len(tensors)}.")
    if call.split_item not in (0, 1, 2, 3):
        raise invalid(f"splitItem must be 0, 1, 2 or 3, but is {call.split_item}.")
    if call.group_type not in ((_ROWS,) if environment.chip == CHIP_310P else (_NONE, _ROWS, _INNER)):
        raise invalid(f"groupType {call.group_type} is not supported.")
    if call.group_type == _INNER:
        raise NotSimulated("aclnnGroupedMatmul", "groupType 2 (groups along k)")
    if call.group_type == _NONE:
        # Scene many-many-many: every group has tensors of its own.
        if call.split_item > 1 or call.group_list is not None:
            raise invalid("groupType -1 needs splitItem 0 or 1 and no groupList.")
        if len(call.x) != len(call.weight) or len(call.out) != len(call.x):
            raise invalid("groupType -1 needs as many tensors in x, weight and y.")
        for i, (x, weight) in enumerate(zip(call.x, call.weight, strict=True)):
            if not 2 <= len(x.shape) <= 6 or len(x.shape) != len(call.x[0].shape) or len(weight.shape) != 2:
                raise invalid(f"x[{i}] must have 2 to 6 dimensions like the others, and weight[{i}] 2.")
        return
    if call.split_item < 2 or many_out:
        raise invalid("groupType 0 needs splitItem 2 or 3 and a single y.")
    for i, x in enumerate(call.x):
        if len(x.shape) != 2:
            raise invalid(f"x[{i}] must have 2 dimensions, but its shape is {list(x.shape)}.")
    if not many_weight and len(call.weight[0].shape) == 3:
        if many_x:
            raise invalid("case with x separated, weight and y not separated is not supported when groupType is 0.")
    else:
        if environment.chip == CHIP_310P:
            raise invalid("weight must be a single tensor of 3 dimensions on this chip.")
        for i, weight in enumerate(call.weight):
            if len(weight.shape) != 2 or weight.shape[-1] != call.weight[0].shape[-1]:
                raise invalid(f"weight[{i}] must have 2 dimensions and the same n as the others: {list(weight.shape)}.")
        if many_x and len(call.x) != len(call.weight):
            raise invalid("x and weight must hold as many tensors.")
    if environment.chip == CHIP_310P and call.weight[0].shape[-1] % _ALIGN_N_310P:
        raise invalid(f"n must be a multiple of {_ALIGN_N_310P} on this chip, but is {call.weight[0].shape[-1]}.")


def _check_group_list(call: _Call) -> None:
    listed = call.group_list
    if call.group_type == _NONE:
        return
    if listed is None:
        if len(call.x) == 1:
            raise invalid("groupList must not be null when x is a single tensor.")
        return
    require_dtype("groupList", listed, (torch.int64,))
    if call.group_list_type == _SPARSE:
        raise invalid("groupListType 2 is only supported when x and weight are INT8.")
    if call.group_list_type not in (_CUMULATIVE, _SIZES):
        raise invalid(f"groupListType must be 0, 1 or 2, but is {call.group_list_type}.")
    limit = _MAX_GROUPS if len(call.weight) == 1 else _MAX_LIST
    if len(listed.shape) != 1 or listed.shape[0] != call.groups or call.groups > limit:
        raise invalid(
            f"groupList needs one value for each of the {call.groups} weights, at most {limit}: {list(listed.shape)}."
        )
    if not is_contiguous(listed):
        raise invalid("groupList does not support non-contiguous input.")


def _check_shapes(call: _Call) -> None:
    k, n = call.weight[0].shape[-2:]
    for i, x in enumerate(call.x):
        expected = call.weight[i].shape[-2] if len(call.weight) > 1 and len(call.x) > 1 else k
        if x.shape[-1] != expected:
            raise invalid(f"x[{i}] dim k value [{x.shape[-1]}] should be equal to weight dim k value [{expected}].")
    for i, bias in enumerate(call.bias):
        width = call.weight[i].shape[-1]
        single = len(call.weight[0].shape) == 3
        if bias.shape != ((call.groups, width) if single else (width,)):
            raise invalid(f"bias[{i}] of shape {list(bias.shape)} does not fit weight {list(call.weight[i].shape)}.")
    if call.group_type == _NONE:
        shapes = [(*x.shape[:-1], w.shape[-1]) for x, w in zip(call.x, call.weight, strict=True)]
    else:
        shapes = [(sum(x.shape[0] for x in call.x), n)]
    for i, (out, shape) in enumerate(zip(call.out, shapes, strict=True)):
        if out.shape != shape:
            raise invalid(
                f"Output {i} tensor's shape {list(out.shape)} is not equal with inferred shape {list(shape)}."
            )


def _ends(call: _Call, rows: int) -> list[int]:
    """Where each group of rows ends. The values are on the device, so only the kernel meets a wrong one."""
    if call.group_list is None:
        sizes = [x.shape[0] for x in call.x]
        return [sum(sizes[: i + 1]) for i in range(len(sizes))]
    values = call.group_list.view().tolist()
    ends = values if call.group_list_type == _CUMULATIVE else [sum(values[: i + 1]) for i in range(len(values))]
    starts = [0, *ends[:-1]]
    if any(end < start for start, end in zip(starts, ends, strict=True)) or ends[-1] != rows:
        # GMM, scenes: not negative, not decreasing, and covering exactly the rows of x.
        raise inner(f"groupList {values} (type {call.group_list_type}) does not cut the {rows} rows of x.")
    if call.group_list_type == _SIZES and len(values) == 1 and len(call.weight) > 1:
        raise inner("groupList of sizes must not have length 1.")
    if len(call.x) > 1 and [end - start for start, end in zip(starts, ends, strict=True)] != [
        x.shape[0] for x in call.x
    ]:
        raise inner(f"groupList {values} does not match the rows of the tensors in x.")
    return ends


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = x.float() @ weight.float()
    return result if bias is None else result + bias.float()


def _compute(call: _Call) -> None:
    def group_bias(i: int) -> torch.Tensor | None:
        if not call.bias:
            return None
        return wide(call.bias[0])[i] if len(call.weight) == 1 and len(call.weight[0].shape) == 3 else wide(call.bias[i])

    if call.group_type == _NONE:
        for i, (x, weight, target) in enumerate(zip(call.x, call.weight, call.out, strict=True)):
            target.view().copy_(_product(x.view(), weight.view(), group_bias(i)))
        return
    rows = torch.cat([x.view() for x in call.x]) if len(call.x) > 1 else call.x[0].view()
    if len(call.weight) == 1 and len(call.weight[0].shape) == 3:
        weights = list(call.weight[0].view())
    else:
        weights = [weight.view() for weight in call.weight]
    out = call.out[0].view()
    start = 0
    for i, end in enumerate(_ends(call, rows.shape[0])):
        if end > start:
            out[start:end].copy_(_product(rows[start:end], weights[i], group_bias(i)))
        start = end


_QUANTISATION = (
    *("scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale"),
    *("activation_input", "activation_quant_scale", "activation_quant_offset"),
)


def _grouped(function: str, environment: Environment, arguments: tuple[Any, ...], out: Tensors | None) -> Compute:
    """`arguments`: those before out (and before tuning_config), in C's order."""
    x, weight, bias, *quantisation = arguments[:8]
    group_list, *activation = arguments[8:12]
    split_item, group_type, group_list_type, act_type = arguments[12:]
    for name, tensors in (("x", x), ("weight", weight), ("out", out)):
        if not tensors:
            raise null(name)
    assert out
    for name, tensors in zip(_QUANTISATION, (*quantisation, *activation), strict=True):
        if tensors:
            raise NotSimulated(function, name)
    if act_type:
        # GMM, note: activations only with per-token quantisation.
        raise invalid(f"actType {act_type} is only supported in the per-token quant case.")
    call = _Call(x, weight, bias or (), group_list, split_item, group_type, group_list_type, out)
    _check_scene(environment, call)
    _check_types(environment, call)
    _check_layouts(call)
    _check_group_list(call)
    _check_shapes(call)
    return lambda: _compute(call)


_HEAD = "8*tensors tensor 3*tensors 4*int64"


@aclnn("aclnnGroupedMatmulV4", f"{_HEAD} 3*tensors", serves="npu_grouped_matmul", document=GMM, since="8.0.RC3")
def grouped_matmul_v4(environment: Environment, *arguments: Any) -> Compute:
    """y[group] = x[group] @ weight[group] + bias[group]. Arguments: aclnn_grouped_matmul_v4.h."""
    head, out = arguments[:-3], arguments[-3]
    return _grouped("aclnnGroupedMatmulV4", environment, head, out)


@aclnn("aclnnGroupedMatmulV5", f"{_HEAD} ints 3*tensors", serves="npu_grouped_matmul", document=GMM, since="8.2.RC1")
def grouped_matmul_v5(environment: Environment, *arguments: Any) -> Compute:
    """V4 with tuning_config, a hint for quantised calls with a single expert (GMM, tuning_config)."""
    head, tuning, out = arguments[:-4], arguments[-4], arguments[-3]
    if tuning:
        raise invalid("tuningConfig is only supported in the quant case.")
    return _grouped("aclnnGroupedMatmulV5", environment, head, out)


OPERATORS = (grouped_matmul_v4, grouped_matmul_v5)
