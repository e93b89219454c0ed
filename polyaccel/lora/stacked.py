"""Adapters on stacked expert parameters, as PEFT's ``target_parameters`` saves them.

A module that keeps all experts in one 3-D parameter gets, for each such parameter, one wrapper around the module;
wrappers nest in the order of the parameters, the first innermost, and each inner one adds ``.base_layer`` to the
tensors' names. For E experts of rank r the wrapper holds ``A: [E * r, in]``, expert by expert, and ``B: [out, r *
E]`` with the expert as the *fastest* index (``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``, PEFT 0.21).
Gate and up share A; their rows lie one after the other in B, as in the fused parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.numbers import MAX_RANK

MAX_EXPERTS = 4096
_WRAPPED = ".base_layer"
# In the order in which the modules define them, which is the order of nesting.
_STACKED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertPart:
    """One expert's share: ``a: [rank, in]`` and ``b: [out, rank]`` (strided), under a per-expert module name."""

    module: str
    expert: int
    a: torch.Tensor
    b: torch.Tensor


def is_stacked(parameter: str) -> bool:
    """Whether a targeted parameter stacks experts."""
    return parameter in _STACKED


def parameter_of(stem: str, stems: Collection[str], target_parameters: Sequence[str]) -> tuple[str, str | None]:
    """Module of a tensor-name stem, and the parameter of it that is adapted (None: the module's weight as usual).

    ``stems`` are all stems of the file, needed to know how deep the wrappers nest.

    Raises:
        AdapterIncompatible: the nesting does not fit the targeted parameters.
    """
    if not target_parameters and not stem.endswith(_WRAPPED):
        return stem, None
    module = stem
    depth = 0
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
        depth += 1
    if _targets(module, "weight", target_parameters):
        return module, "weight"
    wrapped = [name for name in _STACKED if _targets(module, name, target_parameters)]
    # Only a module that holds experts has these as parameters; elsewhere they are modules of their own.
    if depth == 0 and (not wrapped or module.rpartition(".")[2] != "experts"):
        return module, None
    depths = [i for i in range(len(_STACKED) + 1) if module + i * _WRAPPED in stems]
    if depths != list(range(len(wrapped))) or depth not in depths:
        raise AdapterIncompatible(
            f"module {module!r} has {len(depths)} nested adapters, but adapter_config.json's target_parameters name "
            f"{wrapped or 'none of its parameters'}"
        )
    return module, wrapped[-1 - depth]


def _targets(module: str, parameter: str, target_parameters: Sequence[str]) -> bool:
    full = f"{module}.{parameter}"
    return any(full == target or full.endswith(f".{target}") for target in target_parameters)


def split_stacked(
    module: str, parameter: str, a: torch.Tensor, b: torch.Tensor, rank: int, names: tuple[str, str]
) -> tuple[int, list[ExpertPart]]:
    """Number of experts, and the parts of ``a: [experts * rank, in]`` and ``b: [out, rank * experts]`` as views.

    Raises:
        AdapterIncompatible: shapes that do not divide into experts of ``rank``.
    """
    experts, ragged = divmod(a.shape[0], rank)
    if rank > MAX_RANK or ragged or b.shape[1] != a.shape[0] or not 1 <= experts <= MAX_EXPERTS:
        raise AdapterIncompatible(
            f"module {module!r}, parameter {parameter!r}: {names[0]!r} has shape {list(a.shape)} and {names[1]!r} "
            f"{list(b.shape)}; with rank {rank} from adapter_config.json, [experts * {rank}, in] and "
            f"[out, {rank} * experts] are expected"
        )
    if parameter == "gate_up_proj" and b.shape[0] % 2:
        raise AdapterIncompatible(f"{names[1]!r} has {b.shape[0]} rows; gate and up must be equal halves")
    parts: list[ExpertPart] = []
    half = b.shape[0] // 2
    for expert in range(experts):
        a_part = a[expert * rank : (expert + 1) * rank]
        b_part = b[:, expert::experts]
        leaves = [(parameter, b_part)]
        if parameter == "gate_up_proj":
            leaves = [("gate_proj", b_part[:half]), ("up_proj", b_part[half:])]
        for leaf, rows in leaves:
            parts.append(ExpertPart(module=f"{module}.{expert}.{leaf}", expert=expert, a=a_part, b=rows))
    return experts, parts
