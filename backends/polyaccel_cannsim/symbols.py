"""The symbols that the simulated libraries export, and the assembler text of those that Python answers."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import BuildFailed

EMPTY_LIBRARIES = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "nnopbase")
"""Libraries that torch_npu needs, or opens, and takes nothing from, or only what libascendcl has."""

UNSIMULATED = (
    "aclmdlSetDump",
    "aclrtBinaryGetFunction",
    "aclrtBinaryLoadFromData",
    "aclrtDeviceGetBareTgid",
    "aclrtFreePhysical",
    "aclrtGetFunctionAddr",
    "aclrtMallocPhysical",
    "aclrtMapMem",
    "aclrtMemExportToShareableHandle",
    "aclrtMemImportFromShareableHandle",
    "aclrtMemSetPidToShareableHandle",
    "aclrtProcessReport",
    "aclrtReleaseMemAddress",
    "aclrtReserveMemAddress",
    "aclrtUnmapMem",
    "rtDevBinaryRegister",
    "rtFunctionRegister",
    "rtGetC2cCtrlAddr",
    "rtKernelLaunch",
)
"""What libtorch_npu 2.13.0 links against and the simulator only answers with an error that names it."""


def unsimulated_source() -> str:
    """C text with one loud function for each of ``UNSIMULATED``."""
    lines = ['#include "cannsim.h"']
    lines += [f'EXPORT int64_t {name}(void) {{ return cannsim_unsimulated("{name}"); }}' for name in UNSIMULATED]
    return "\n".join(lines) + "\n"


_X86 = (
    "{name}:\n endbr64\n jmp *{slot}(%rip)\n",
    "{name}$unfilled:\n endbr64\n leaq {name}$text(%rip), %rdi\n jmp cannsim_unsimulated@PLT\n",
)
_ARM = (
    "{name}:\n hint #34\n adrp x16, {slot}\n ldr x16, [x16, :lo12:{slot}]\n br x16\n",
    "{name}$unfilled:\n hint #34\n adrp x0, {name}$text\n add x0, x0, :lo12:{name}$text\n b cannsim_unsimulated\n",
)
TRAMPOLINES = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
"""By machine: an exported function that jumps through its slot, arguments untouched, and what an empty slot does."""


def assembly(machine: str, table: str, own: Sequence[str], shared: Sequence[str] = ()) -> str:
    """Assembler text of a library whose functions are filled in at run time.

    Args:
        machine: as ``platform.machine()`` says.
        table: exported name of the array of slots, in the order of ``own``; a slot ``<table>_shared`` follows.
        own: functions with a slot each.
        shared: functions that all jump through the shared slot.

    Raises:
        BuildFailed: there is no trampoline for the machine.
    """
    if machine not in TRAMPOLINES:
        raise BuildFailed(f"no trampolines for {machine}; written are {', '.join(sorted(TRAMPOLINES))}")
    jump, unfilled = TRAMPOLINES[machine]
    text, data, strings = [".text"], [], []
    for i, name in enumerate(own):
        slot = f"{table}$slot{i}"
        text.append(f".globl {name}\n.type {name},%function\n.p2align 4\n" + jump.format(name=name, slot=slot))
        text.append(unfilled.format(name=name))
        data.append(f"{slot}: .quad {name}$unfilled")
        strings.append(f'{name}$text: .asciz "{name}"')
    shared_slot = f"{table}$shared"
    for name in shared:
        text.append(f".globl {name}\n.type {name},%function\n.p2align 4\n" + jump.format(name=name, slot=shared_slot))
    text.append(unfilled.format(name=f"{table}$any"))
    strings.append(f'{table}$any$text: .asciz "phase 2 of an operator"')
    return "\n".join(
        [
            *text,
            ".data",
            ".p2align 3",
            f".globl {table}",
            f"{table}:",
            *data,
            f".globl {table}_shared",
            f"{table}_shared:",
            f"{shared_slot}: .quad {table}$any$unfilled",
            ".section .rodata",
            *strings,
            '.section .note.GNU-stack,"",%progbits',
            "",
        ]
    )
