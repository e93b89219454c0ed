"""An adapter on one module of a model, cut by the engine's own code for one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import Backend, Device, PackedAdapter, Weight
from polyaccel_conformance.models.families import FAMILIES, write_peft

Floats = npt.NDArray[np.float64]
Ranges = tuple[tuple[int, int], ...]

FAMILY = replace(FAMILIES["llama"], layers=1, vocabulary=16)
"""Head counts as SmolLM2's: no world size but 3 cuts them evenly, and four ranks share a KV head."""
FEATURES = {name.split(".")[-2]: shape for name, shape in FAMILY.shapes().items() if "_proj." in name}
"""Output and input features of each module."""
ROW_PARALLEL = frozenset({"o_proj", "down_proj"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleCut:
    """One rank's part.

    Attributes:
        site, weight: where the delta is added: the model's own weight there, all zeros.
        packed: this rank's share of the adapter; None where it holds nothing of the module.
        columns: input features of this rank, in the order of its x; ``width`` of x, padding included.
        begin: first column of y that is the module's; ``rows``: output features that follow there.
    """

    site: str
    weight: Weight
    packed: PackedAdapter | None
    columns: Ranges
    width: int
    begin: int
    rows: Ranges


def write_adapter(folder: Path, module: str, a: Floats, b: Floats, alpha: float) -> Path:
    """A PEFT folder with one module: ``a: [rank, in]``, ``b: [out, rank]``, in float32."""
    stem = f"base_model.model.{_name(module)}"
    tensors = {f"{stem}.lora_A.weight": a.astype(np.float32), f"{stem}.lora_B.weight": b.astype(np.float32)}
    return write_peft(folder, tensors, rank=a.shape[0], alpha=alpha, modules=[module])


def cut_module(
    backend: Backend,
    device: Device,
    folder: Path,
    module: str,
    *,
    dtype: torch.dtype,
    rank: int,
    world_size: int,
    rank_rows: int,
) -> ModuleCut:
    """Build the rank's part of the model, match the adapter with it and pack it, as the engine does at a load.

    Raises:
        AdapterError: the engine refuses the adapter.
    """
    from polyaccel.lora.adapter_file import AdapterFile
    from polyaccel.lora.match import match_adapter
    from polyaccel.lora.pack import pack_adapter
    from polyaccel.models.config import ModelConfig
    from polyaccel.models.model import ModelOptions
    from polyaccel.models.registry import build_model

    model = build_model(
        ModelOptions(
            config=ModelConfig.from_hf(FAMILY.config()),
            backend=backend,
            devices=(device,),
            rank=rank,
            world_size=world_size,
            dtype=dtype,
            rank_rows=rank_rows,
            max_positions=16,
        )
    )
    targets = model.targets()
    (target,) = [target for target in targets if target.module == _name(module)]
    matched = match_adapter(AdapterFile.open(folder), targets)
    packed = pack_adapter(matched.pairs, dtype=dtype) if target.is_local else None
    weight = model.weights()[target.site]
    for index, part in enumerate(weight.spec.slices):
        weight.write(index, torch.zeros(part.n, weight.spec.k, dtype=dtype))
    weight.seal()
    return ModuleCut(
        site=target.site,
        weight=weight,
        packed=packed,
        columns=target.in_cols.ranges,
        width=weight.spec.k,
        begin=weight.spec.starts[target.slice],
        rows=target.out_rows.ranges,
    )


def _name(module: str) -> str:
    return next(name.removesuffix(".weight") for name in FAMILY.shapes() if name.endswith(f".{module}.weight"))
