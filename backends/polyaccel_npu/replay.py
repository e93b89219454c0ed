"""Who was it: the calls of a failed step, repeated one by one in a child that waits for each.

``python -m polyaccel_npu.replay FILE DEVICE`` runs the calls of a :class:`~polyaccel_npu.journal.Journal`; the parent
sets ASCEND_LAUNCH_BLOCKING=1, under which the failing call itself raises. A communicator's name is replaced by that of
a group of one, which fused operators take.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from polyaccel.backend import OperandInfo
from polyaccel_npu import runtime
from polyaccel_npu.errors import parse
from polyaccel_npu.journal import Called, Journal, load, rebuild

REPLAY_SECONDS = 120.0
FUSED = "npu.npu_mm_all_reduce_base"
HCOM_PLACE = 2
"""Which positional argument of the fused operator names the communicator."""


def blame(journal: Journal, device: int, rank: int | None) -> str:
    """Repeat the journal's calls in a child and say which one fails, with its operands; in words, for an error."""
    where = "" if rank is None else f" of rank {rank}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calls"
        path.write_text(journal.dump())
        environment = {**os.environ, "ASCEND_LAUNCH_BLOCKING": "1", runtime.AUTOLOAD: "0"}
        try:
            child = subprocess.run(
                [sys.executable, "-m", "polyaccel_npu.replay", str(path), str(device)],
                capture_output=True,
                text=True,
                timeout=REPLAY_SECONDS,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"blame: repeating the step took more than {REPLAY_SECONDS:g} s"
    lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
    if not lines:
        tail = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        return f"blame: the step could not be repeated: {tail[0]:.300}"
    found = json.loads(lines[-1])
    if not found.get("kernel"):
        return f"blame: none of the {found['calls']} calls{where} fails when repeated with other values"
    operands = "\n".join(f"  {operand}" for operand in found["operands"])
    place = f"call {found['number']} of {found['calls']}{where}, npu.{found['kernel']}"
    return f"blame: {place}: {found['failure']}\n{operands}"


def main(path: str, device: str) -> None:
    """Repeat the calls of a file on a device; print what failed as one line of JSON."""
    npu = runtime.npu()
    npu.set_device(int(device))
    own = torch.device("npu", int(device))
    calls, hcom = load(Path(path).read_text()), ""
    groups = []
    for number, call in enumerate(calls, 1):
        if call.operator == FUSED and not hcom:
            group, hcom = group_of_one(own)
            groups.append(group)
        args, kwargs = arguments(call, own, hcom)
        try:
            function(call.operator)(*args, **kwargs)
            npu.synchronize()
        except RuntimeError as error:
            operands = [str(operand) for operand in described(args, kwargs)]
            report = {"kernel": call.kernel, "number": number, "operands": operands, "failure": str(parse(str(error)))}
            print(json.dumps({**report, "calls": len(calls)}))
            return
    print(json.dumps({"calls": len(calls)}))


def arguments(call: Called, device: torch.device, hcom: str) -> tuple[list[object], dict[str, object]]:
    """What the call took, made anew."""
    args, kwargs = json.loads(call.arguments)
    if call.operator == FUSED:
        args[HCOM_PLACE] = hcom
    return [rebuild(x, device) for x in args], {name: rebuild(x, device) for name, x in kwargs.items()}


def described(args: list[object], kwargs: dict[str, object]) -> list[OperandInfo]:
    """The tensors among arguments."""
    found = []
    for name, value in [*((f"argument {i}", x) for i, x in enumerate(args)), *kwargs.items()]:
        values = value if isinstance(value, list) else [value]
        found += [OperandInfo.of(name, x) for x in values if isinstance(x, torch.Tensor)]
    return found


def function(operator: str) -> torch._ops.OpOverloadPacket:
    """An operator of torch.ops by ``namespace.name``."""
    namespace, _, name = operator.partition(".")
    found = getattr(getattr(torch.ops, namespace), name)
    assert isinstance(found, torch._ops.OpOverloadPacket)
    return found


def group_of_one(device: torch.device) -> tuple[object, str]:
    """A new communicator of this process alone, which lives as long as the object, and its name."""
    import torch.distributed as dist

    module = importlib.import_module("torch_npu._C._distributed_c10d")
    group = module.ProcessGroupHCCL(dist.HashStore(), 0, 1, module.ProcessGroupHCCL.Options())  # type: ignore[attr-defined]
    with runtime.npu().device(device):
        return group, str(group.get_hccl_comm_name(0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
