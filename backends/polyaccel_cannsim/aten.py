"""Plain aten operators of the card, computed on CPU views of its memory: an explicit list, each with its reason.

An operator of this list runs here only as long as no simulated aclnn function serves it; then torch_npu's own path
does, as everywhere else. Where no function is exported either, that ends in a loud error which names the missing one.
What runs here is in the ledger as ``aten::name``, so that a test can compare it with what it allows.

It obeys its stream like any kernel: it is queued behind what was launched before, runs when the stream does, and can
be captured. Only what must know values to know a shape waits for the stream (``Kind.READS``), as it does on a card.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from .errors import CannsimError

if TYPE_CHECKING:
    from .simulator import Simulator


class Kind(enum.Enum):
    """When an operator's result is known."""

    QUEUED = "queued"
    """The shape of the result follows from the operands' shapes: it is queued."""
    READS = "reads"
    """The result's shape, or a Python value, follows from values: the stream is synchronised first."""


@dataclass(frozen=True)
class Allowed:
    """One overload that may run on CPU views.

    Attributes:
        name: ``aten::add.Tensor``.
        reason: who needs it.
        aclnn: the functions that torch_npu 2.13.0 asks for (seen by running it); once all are exported, it is theirs.
    """

    name: str
    reason: str
    kind: Kind
    aclnn: tuple[str, ...]


_TABLE = (
    (
        "element-wise arithmetic of the composites (dense, sampling, lora): one rounding, no rule to break but dtypes",
        Kind.QUEUED,
        """
        add.Tensor=Add,Adds add.Scalar=Adds add_.Tensor=InplaceAdd,InplaceAdds add_.Scalar=InplaceAdds
        sub.Tensor=Sub,Subs sub.Scalar=Subs sub_.Tensor=InplaceSub,InplaceSubs rsub.Scalar=Rsubs mul.Tensor=Mul,Muls
        mul.Scalar=Muls mul_.Tensor=InplaceMul,InplaceMuls mul_.Scalar=InplaceMuls div.Tensor=Div,Divs div.Scalar=Divs
        div_.Tensor=InplaceDiv,InplaceDivs div_.Scalar=InplaceDivs div.Tensor_mode=DivMod,DivMods
        div.Scalar_mode=DivMods neg=Neg abs=Abs reciprocal=Reciprocal exp=Exp log=Log rsqrt=Rsqrt sqrt=Sqrt
        pow.Tensor_Scalar=PowTensorScalar pow.Scalar=PowScalarTensor cos=Cos sin=Sin erf=Erf silu=Silu sigmoid=Sigmoid
        maximum=Maximum minimum=Minimum remainder.Scalar=RemainderTensorScalar remainder.Tensor=RemainderTensorTensor
        floor_divide=FloorDivide,FloorDivides nan_to_num=NanToNum clamp=Clamp clamp_=Clamp clamp_min=ClampMin
        clamp_max=ClampMax _softmax=Softmax _log_softmax=LogSoftmax tanh=Tanh
        """,
    ),
    (
        "comparisons and masks of the composites' sampling and attention",
        Kind.QUEUED,
        """
        eq.Scalar=EqScalar eq.Tensor=EqTensor ne.Scalar=NeScalar ne.Tensor=NeTensor lt.Scalar=LtScalar
        lt.Tensor=LtTensor le.Scalar=LeScalar le.Tensor=LeTensor gt.Scalar=GtScalar gt.Tensor=GtTensor
        ge.Scalar=GeScalar ge.Tensor=GeTensor isnan=NeTensor logical_and=LogicalAnd
        logical_or=LogicalOr logical_not=LogicalNot where.self=SWhere masked_fill.Scalar=InplaceMaskedFillScalar
        masked_fill_.Scalar=InplaceMaskedFillScalar masked_fill.Tensor=InplaceMaskedFillTensor
        masked_fill_.Tensor=InplaceMaskedFillTensor
        """,
    ),
    (
        "moves elements only: the composites build segments, tables and batches with it",
        Kind.QUEUED,
        """
        cat=Cat stack=Stack repeat=Repeat repeat_interleave.self_int=RepeatInterleaveIntWithDim
        constant_pad_nd=ConstantPadNd
        """,
    ),
    (
        "gathers and scatters of the composites: embedding rows, KV slots, adapters' rows",
        Kind.QUEUED,
        """
        index_select=IndexSelect gather=Gather index.Tensor=Index index_put_=IndexPutImpl _index_put_impl_=IndexPutImpl
        index_copy_=InplaceIndexCopy index_copy=IndexCopy index_add_=IndexAdd index_add=IndexAdd
        scatter_.src=InplaceScatter scatter_.value=InplaceScatterValue
        scatter.src=Scatter scatter.value=ScatterValue
        embedding=Embedding
        """,
    ),
    (
        "reductions of the composites: norms, sampling, checks of a step",
        Kind.QUEUED,
        """
        sum=ReduceSum sum.dim_IntList=ReduceSum mean=Mean mean.dim=Mean amax=Amax max=Max max.dim=MaxDim
        min=Min argmax=ArgMax all=All any=Any any.dim=Any all.dim=All cumsum=Cumsum
        """,
    ),
    (
        "makes a tensor of a constant: buffers, positions, masks",
        Kind.QUEUED,
        """
        fill_.Scalar=InplaceFillScalar fill_.Tensor=InplaceFillTensor zero_=InplaceZero zeros=InplaceZero
        ones=InplaceOne full=InplaceFillScalar arange=Arange arange.start=Arange arange.start_step=Arange
        arange.out=Arange arange.start_out=Arange scalar_tensor=InplaceFillScalar
        """,
    ),
    (
        "orders and counts of the composites' sampling and expert routing",
        Kind.QUEUED,
        """
        sort=Sort sort.stable=Sort topk=Topk bincount=Bincount
        """,
    ),
    (
        "unpacks quantised codes in the composite dequantize",
        Kind.QUEUED,
        """
        bitwise_and.Tensor=BitwiseAndTensor bitwise_and.Scalar=BitwiseAndScalar bitwise_or.Tensor=BitwiseOrTensor
        bitwise_or.Scalar=BitwiseOrScalar bitwise_xor.Tensor=BitwiseXorTensor bitwise_not=BitwiseNot
        __lshift__.Scalar=LeftShifts __rshift__.Scalar=RightShift bitwise_left_shift.Tensor_Scalar=LeftShifts
        bitwise_right_shift.Tensor_Scalar=RightShift
        """,
    ),
    (
        "its result's shape depends on values: set-up and checks use it, never a step",
        Kind.READS,
        """
        nonzero=Nonzero masked_select=MaskedSelect _unique2=Unique2 unique_consecutive=UniqueConsecutive
        repeat_interleave.Tensor=RepeatInterleave equal=Equal
        """,
    ),
)
"""Reason, when the result is known, and operator=aclnn functions (without the prefix) that would serve it."""


def _allowed() -> Mapping[str, Allowed]:
    out = {}
    for reason, kind, words in _TABLE:
        for word in words.split():
            name, _, wanted = word.rpartition("=")
            one = Allowed(f"aten::{name}", reason, kind, tuple(f"aclnn{part}" for part in wanted.split(",")))
            out[one.name] = one
    return MappingProxyType(out)


ALLOWED: Mapping[str, Allowed] = _allowed()
"""What may run on CPU views, by its full name."""


def in_use(exported: Mapping[str, object]) -> list[Allowed]:
    """The part of the list that no exported aclnn function serves."""
    return [one for one in ALLOWED.values() if not all(name in exported for name in one.aclnn)]


def install(simulator: Simulator) -> None:
    """Puts the operators in use before torch_npu's own kernels. torch_npu must be imported."""
    from .aten_kernel import AtenKernel

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    simulator.retain(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every kernel that is replaced; replacing them is the point
        for allowed in in_use(simulator.rules):
            base, _, overload = allowed.name.removeprefix("aten::").partition(".")
            operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            if operator is None:
                raise CannsimError(f"{allowed.name} is on the list, and torch {torch.__version__} has no such operator")
            kernel = AtenKernel(simulator, operator, allowed)
            library.impl(operator, kernel.__call__, "PrivateUse1", allow_override=True)
