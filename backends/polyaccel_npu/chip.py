"""Which chip a device is, and what of it the backend must know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """A family of chips.

    Attributes:
        family: ``A2`` (910B), ``A3`` (910_93), ``950``, ``310P`` or ``910A``.
        bfloat16: matrices of bfloat16.
        fused_all_reduce: the fused product and sum over ranks (aclnnMatmulAllReduce is documented for A2 only).
        paged: FIA with paged keys and the KV scatter in ND layout.
        grouped_float32: grouped matmul of every float dtype; 310P has float16 alone.
        float32_products: matrices of float32 are multiplied as such; else the cube rounds them to float16 first
            (aclnnMm, cubeMathType 1 on 310P), and says nothing.
        refusal: why the backend does not run on it at all; empty if it does.
    """

    family: str
    bfloat16: bool = True
    fused_all_reduce: bool = False
    paged: bool = True
    grouped_float32: bool = True
    float32_products: bool = True
    refusal: str = ""


A2 = Chip("A2", fused_all_reduce=True)
A3 = Chip("A3")
A5 = Chip("950")
P310 = Chip("310P", bfloat16=False, paged=False, grouped_float32=False, float32_products=False)
A1 = Chip("910A", bfloat16=False, paged=False, grouped_float32=False, float32_products=False)


def chip_of(name: str) -> Chip:
    """The chip by the name that ``torch.npu.get_device_name`` gives, such as ``Ascend910B3``."""
    bare = name.lower().replace("ascend", "").replace("_", "").replace(" ", "")
    if bare.startswith("310p"):
        return P310
    if bare.startswith("91093"):
        return A3
    if bare.startswith("910b"):
        return A2
    if bare.startswith("950"):
        return A5
    if bare.startswith("910"):
        return A1
    return Chip(name, bfloat16=False, paged=False, grouped_float32=False, refusal=f"unknown chip {name!r}")
