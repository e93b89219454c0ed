"""Calls of torch_npu's fused products that break one documented constraint each, and the legal ones they start from.

``python -m tests.npu.constraints.violations [KEY]`` makes those of the chip that is simulated here, and prints as JSON
what each one came to: what torch_npu said, what reached CANN, and what :mod:`tests.npu.constraints.witness` finds in
it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from tests.npu.constraints.witness import Facts, found_in

TWO, FOUND, SECOND = "two", 2, "second"
GROUPS: Mapping[str, int] = MappingProxyType({TWO: 2, SECOND: 2, "one": 1, "three": 3, "five": 5, "sixteen": 16})
"""Communicators of this process by name: how many ranks they have."""
CHIPS = ("910B", "A3", "310P")
OLD_CANN = "8.0.RC1"
EMPTY = (torch.float16, (0, 8))


@dataclass(frozen=True)
class Group:
    """A communicator in the simulator's book whose ranks all hold what this one holds."""

    name: str
    size: int
    rank: int = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.size

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.size)

    def close(self) -> None:
        return None


def half(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype).to("npu")


def byte(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int8).to("npu")


def reduce(x1: Any = None, x2: Any = None, hcom: str = TWO, **options: Any) -> Any:
    """``npu_mm_all_reduce_base`` of legal operands, some of them changed."""
    import torch_npu

    x1, x2 = half(4, 8) if x1 is None else x1, half(6, 8).t() if x2 is None else x2
    return torch_npu.npu_mm_all_reduce_base(x1, x2, hcom, **options)


def scatter(x1: Any = None, x2: Any = None, hcom: str = TWO, world: int = 2, **options: Any) -> Any:
    import torch_npu

    x1, x2 = half(4, 256) if x1 is None else x1, half(6, 256).t() if x2 is None else x2
    return torch_npu.npu_mm_reduce_scatter_base(x1, x2, hcom, world, **options)


def gather(x1: Any = None, x2: Any = None, hcom: str = TWO, world: int = 2, **options: Any) -> Any:
    import torch_npu

    x1, x2 = half(4, 256) if x1 is None else x1, half(6, 256).t() if x2 is None else x2
    return torch_npu.npu_all_gather_base_mm(x1, x2, hcom, world, **options)


def reduce_w8(x1: Any = None, x2: Any = None, **options: Any) -> Any:
    """A16W8: int8 weights, float16 rows."""
    options = {"antiquant_scale": half(6), **options}
    return reduce(half(4, 64) if x1 is None else x1, byte(6, 64).t() if x2 is None else x2, **options)


def reduce_a8w8(x1: Any = None, x2: Any = None, **options: Any) -> Any:
    """A8W8 with a packed scale."""
    options = {"dequant_scale": torch.ones(6, dtype=torch.int64).to("npu"), **options}
    return reduce(byte(4, 8) if x1 is None else x1, byte(6, 8).t() if x2 is None else x2, **options)


def after_another(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call after a legal one on the first communicator."""

    def both() -> Any:
        reduce()
        return call()

    return both


def wide(rows: int, columns: int) -> torch.Tensor:
    """A tensor of one element, whatever its shape says."""
    return half(1, 1).expand(rows, columns)


@dataclass(frozen=True)
class Violation:
    """One call.

    Attributes:
        row, column: the cell of the table: the constraint, and the operator that has it.
        name: what is wrong.
        words: in the refusal.
        code: CANN's status; 0 where torch_npu refuses before CANN is asked.
        chip: on which it is made.
        cann: the CANN version; empty for the usual one.
        alone: nothing works after it in the same process: the device itself failed.
    """

    row: str
    column: str
    name: str
    words: str
    call: Callable[[], Any] = field(compare=False)
    code: int = 161002
    chip: str = "910B"
    cann: str = ""
    alone: bool = False

    @property
    def key(self) -> str:
        return f"{self.row}, {self.column}, {self.name}"

    @property
    def process(self) -> tuple[str, str, str]:
        """Chip, CANN version and, for one that needs a process of its own, its key."""
        return self.chip, self.cann, self.key if self.alone else ""


CALLS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"all_reduce": reduce, "reduce_scatter": scatter, "all_gather": gather}
)
PAIRS = ("reduce_scatter", "all_gather")


def _chips() -> list[Violation]:
    found = [("A3", "all_reduce"), ("310P", "all_reduce"), ("310P", "reduce_scatter"), ("310P", "all_gather")]
    words = "not supported on this chip"
    return [Violation("chips", column, chip, words, CALLS[column], chip=chip) for chip, column in found]


def _worlds() -> list[Violation]:
    cells = [("all_reduce", "three", "910B"), ("all_reduce", "five", "910B"), ("all_reduce", "sixteen", "910B")]
    cells += [(column, name, "910B") for column in PAIRS for name in ("one", "three", "sixteen")]
    cells += [(column, "three", "A3") for column in PAIRS]
    found = []
    for column, name, chip in cells:
        size = GROUPS[name]

        def call(column: str = column, name: str = name, size: int = size) -> Any:
            if column == "all_reduce":
                return reduce(hcom=name)
            return CALLS[column](half(48, 256), hcom=name, world=size)

        # op-plugin knows some of the rule, CANN all of it.
        early = column != "all_reduce" and size != 16
        words = "world_size should be in" if early else f"has {size}"
        name, code = f"{size} ranks on {chip}", 0 if early else 561002
        found.append(Violation("world size", column, name, words, call, code=code, chip=chip))
    return found


def _x1() -> list[Violation]:
    uncontiguous = "has 1 uncontiguous input"
    found = [
        Violation("x1", "all_reduce", "transposed", uncontiguous, lambda: reduce(half(8, 4).t()), 561000),
        Violation(
            "x1", "all_reduce", "columns of a wider one", uncontiguous, lambda: reduce(half(4, 16)[:, :8]), 561000
        ),
        Violation("x1", "all_reduce", "every other row", uncontiguous, lambda: reduce(half(8, 8)[::2]), 561000),
        Violation(
            "x1", "all_reduce", "one row expanded", uncontiguous, lambda: reduce(half(1, 8).expand(4, 8)), 561000
        ),
        Violation("x1", "all_reduce", "1-D", "at least 2 dimensions", lambda: reduce(half(8)), 0),
        Violation("x1", "all_reduce", "4-D", "2 to 3 dimensions", lambda: reduce(half(1, 2, 2, 8))),
        Violation("x1", "all_reduce", "float32", "dtype", lambda: reduce(half(4, 8).float(), half(6, 8).float().t())),
        Violation("x1", "all_reduce", "two dtypes", "dtype", lambda: reduce(half(4, 8).bfloat16())),
        Violation("x1", "reduce_scatter", "rows", "divisible by world_size", lambda: scatter(half(3, 256)), 0),
    ]
    for column in PAIRS:
        call = CALLS[column]
        found += [
            Violation("x1", column, "transposed", "transposed", lambda call=call: call(half(256, 4).t())),
            Violation("x1", column, "strided", uncontiguous, lambda call=call: call(half(4, 512)[:, :256]), 561000),
            Violation("x1", column, "3-D", "required to be 2D", lambda call=call: call(half(2, 2, 256)), 0),
            Violation(
                "x1", column, "float32", "dtype", lambda call=call: call(half(4, 256).float(), half(256, 6).float())
            ),
        ]
    return found


def _x2() -> list[Violation]:
    words = "only as a transpose"
    found = []
    for column, k in (("all_reduce", 8), ("reduce_scatter", 256), ("all_gather", 256)):
        call = CALLS[column]
        strides: Mapping[str, Callable[[int], torch.Tensor]] = {
            "columns of a wider one": lambda k: half(k, 12)[:, :6],
            "every other row": lambda k: half(2 * k, 6)[::2],
            "transpose of a wider one": lambda k: half(6, 2 * k)[:, :k].t(),
            "expanded": lambda k: half(1, 6).expand(k, 6),
        }
        for name, make in strides.items():
            found.append(
                Violation("x2", column, name, words, lambda call=call, make=make, k=k: call(half(4, k), make(k)))
            )
        words3 = "needs to be 2D" if column == "all_reduce" else "required to be 2D"
        found.append(Violation("x2", column, "3-D", words3, lambda call=call, k=k: call(half(4, k), half(1, k, 6)), 0))
    return found


def _k() -> list[Violation]:
    too_long = 2**31
    found = [
        Violation("k", "all_reduce", "2^31", "exceed", lambda: reduce(wide(1, too_long), wide(too_long, 2))),
        Violation("k", "all_reduce", "unequal", "K of x1 and x2 should be same", lambda: reduce(half(4, 9)), 0),
        Violation("k", "all_reduce", "A16W8 65536", "65535", lambda: reduce_w8(half(1, 65536), byte(65536, 6))),
        Violation("k", "all_reduce", "A8W8 65536", "65535", lambda: reduce_a8w8(byte(1, 65536), byte(6, 65536).t())),
    ]
    for column in PAIRS:
        call = CALLS[column]
        for k in (1, 255, 65535):
            found.append(Violation("k", column, str(k), "k-axis", lambda call=call, k=k: call(half(4, k), half(k, 2))))
    return found


def _empty() -> list[Violation]:
    return [
        Violation("empty tensors", "all_reduce", "m", "empty", lambda: reduce(half(0, 8))),
        Violation("empty tensors", "all_reduce", "k", "empty", lambda: reduce(half(4, 0), half(0, 6))),
        Violation("empty tensors", "all_reduce", "n", "empty", lambda: reduce(x2=half(8, 0))),
        Violation("empty tensors", "reduce_scatter", "k", "k-axis", lambda: scatter(half(4, 0), half(0, 6))),
    ]


def _bias() -> list[Violation]:
    found = [
        Violation("bias", "all_reduce", "2-D", "bias", lambda: reduce(bias=half(1, 6))),
        Violation("bias", "all_reduce", "length", "bias", lambda: reduce(bias=half(5))),
        Violation("bias", "all_reduce", "strided", "has 1 uncontiguous", lambda: reduce(bias=half(12)[::2]), 561000),
        Violation("bias", "all_reduce", "float for A8W8", "bias", lambda: reduce_a8w8(bias=half(6))),
        Violation(
            "bias",
            "all_reduce",
            "strided x3",
            "has 1 uncontiguous",
            lambda: reduce(x3=half(6, 4).t()),
            561000,
        ),
    ]
    for column in PAIRS:
        call = CALLS[column]
        words = "bias that is not zero"
        found.append(Violation("bias", column, "not zero", words, lambda call=call: call(bias=half(6)), 0, alone=True))
    return found


def _reduction() -> list[Violation]:
    row = "reduce_op / comm_turn"
    found = [Violation(row, "all_reduce", op, "reduceOp", lambda op=op: reduce(reduce_op=op)) for op in ("max", "prod")]
    found += [
        Violation(row, column, "comm_turn 1", "commTurn", lambda call=call: call(comm_turn=1))
        for column, call in CALLS.items()
    ]
    found += [
        Violation(row, "reduce_scatter", "max", "reduceOp", lambda: scatter(reduce_op="max")),
        Violation(row, "all_gather", "gather_index 1", "gatherIndex", lambda: gather(gather_index=1)),
    ]
    return found


def _domain() -> list[Violation]:
    row, words = "comm domain", "share one communicator"
    found = []
    for column, call in CALLS.items():
        second = after_another(lambda call=call: call(hcom=SECOND))
        found.append(Violation(row, column, "a second one", words, second, 561000))
        unknown = lambda call=call: call(hcom="nobody's")  # noqa: E731
        found.append(Violation(row, column, "one that nobody made", "no communicator", unknown, 561000))
    return found


def _use() -> list[Violation]:
    """Modes of communication that the usual functions do not have. (That a step is one of decode no operator knows.)"""
    missing = "not in libopapi.so"
    return [
        Violation("use", "all_reduce", "aiv", "comm_mode is not supported", lambda: reduce(comm_mode="aiv"), 0),
        Violation("use", "all_reduce", "ai_cpu", "comm_mode is not supported", lambda: reduce(comm_mode="ai_cpu"), 0),
        Violation("use", "reduce_scatter", "aiv", missing, lambda: scatter(comm_mode="aiv"), 0),
        Violation("use", "all_gather", "aiv", missing, lambda: gather(comm_mode="aiv"), 0),
    ]


def _a16w8() -> list[Violation]:
    scale, group = "antiquantScale", "multiple of 32"
    broken: list[tuple[str, str, dict[str, Any]]] = [
        ("scale of k", scale, {"antiquant_scale": (64,)}),
        ("scale [n, 1]", scale, {"antiquant_scale": (6, 1)}),
        ("offset of another shape", "antiquantOffset", {"antiquant_offset": (1,)}),
        ("groups of 16", group, {"antiquant_scale": (4, 6), "antiquant_group_size": 16}),
        ("groups of 48", group, {"antiquant_scale": (2, 6), "antiquant_group_size": 48}),
        ("groups of k", group, {"antiquant_scale": (1, 6), "antiquant_group_size": 64}),
    ]
    found = []
    for name, words, options in broken:

        def call(options: Mapping[str, Any] = options) -> Any:
            return reduce_w8(**{key: half(*v) if isinstance(v, tuple) else v for key, v in options.items()})

        found.append(Violation("A16W8", "all_reduce", name, words, call))
    return found


def _a8w8() -> list[Violation]:
    def single(*shape: int) -> torch.Tensor:
        return torch.ones(shape).to("npu")

    def by_token(size: int, step: int = 1) -> Any:
        return reduce_a8w8(dequant_scale=single(6), pertoken_scale=single(size)[::step])

    def integers(column: str) -> Any:
        scales = {"x1_scale": single(4, 1), "x2_scale": single(1, 6)}
        return CALLS[column](byte(4, 256), byte(256, 6), output_dtype=torch.float16, **scales)

    row, mode = "A8W8", "quantization not supported"
    plain = lambda: reduce_a8w8(dequant_scale=single(6))  # noqa: E731
    return [
        Violation(row, "all_reduce", "plain float32 scale", "dtype support list", plain),
        Violation(row, "all_reduce", "no scale", "dequantScale", lambda: reduce_a8w8(dequant_scale=None), 161001),
        Violation(row, "all_reduce", "strided token scale", "has 1 uncontiguous", lambda: by_token(8, 2), 561000),
        Violation(row, "all_reduce", "token scale of another length", "doesn't match", lambda: by_token(5), 0),
        *(Violation(row, column, "without aiv", mode, lambda c=column: integers(c), 0) for column in PAIRS),
    ]


def _cann() -> list[Violation]:
    return [
        Violation("CANN/driver", column, OLD_CANN, "not in libopapi.so", call, 0, cann=OLD_CANN)
        for column, call in CALLS.items()
    ]


VIOLATIONS: tuple[Violation, ...] = (
    *_chips(),
    *_worlds(),
    *_x1(),
    *_x2(),
    *_k(),
    *_empty(),
    *_bias(),
    *_reduction(),
    *_domain(),
    *_use(),
    *_a16w8(),
    *_a8w8(),
    *_cann(),
)
LEGAL: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "all_reduce": reduce,
        "all_reduce 3-D": lambda: reduce(half(2, 2, 8)),
        "all_reduce dense x2": lambda: reduce(x2=half(8, 6)),
        "all_reduce bias and x3": lambda: reduce(bias=half(6), x3=half(4, 6)),
        "all_reduce bfloat16": lambda: reduce(half(4, 8).bfloat16(), half(6, 8).bfloat16().t()),
        "all_reduce A16W8": reduce_w8,
        "all_reduce A8W8": reduce_a8w8,
        "reduce_scatter": scatter,
        "all_gather": gather,
    }
)
LEGAL_ON: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"910B": tuple(LEGAL), "A3": ("reduce_scatter", "all_gather"), "310P": ()}
)


def main(own: str = "") -> None:
    """Make the calls of this process's machine one by one. ASCEND_LAUNCH_BLOCKING=1: each is refused on the spot."""
    import torch_npu  # noqa: F401

    import polyaccel_cannsim
    from polyaccel_cannsim.hccl.domains import domains_of

    machine = polyaccel_cannsim.current()
    for name, size in GROUPS.items():
        domains_of(machine).add(Group(name, size))  # type: ignore[arg-type]
    chip, ledger = machine.settings.soc.chip.value, machine.ledger
    cann = os.environ.get("CANNSIM_CANN", "")
    report: dict[str, dict[str, Any]] = {}

    def note(key: str, call: Callable[[], Any]) -> None:
        ledger.reset()
        entry: dict[str, Any] = {"refusal": "", "code": 0}
        try:
            call()
            torch.npu.synchronize()  # type: ignore[attr-defined]
        except RuntimeError as refusal:
            entry["refusal"] = str(refusal)
        facts, calls = Facts(chip, GROUPS, cann), list(ledger)
        entry["code"] = next((c.refused for c in calls if c.refused), 0)
        entry["reached"] = [c.name for c in calls if c.name in facts.functions]
        entry["broken"] = sorted({row for c in calls for row, _ in found_in(c, facts)})
        report[key] = entry

    if not cann and not own:
        for name in LEGAL_ON[chip]:
            note(f"legal {name}", LEGAL[name])
    for violation in VIOLATIONS:
        if violation.process == (chip, cann, own):
            note(violation.key, violation.call)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
