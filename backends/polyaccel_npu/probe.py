"""Whether this machine can run the backend, found out without harm: a broken CANN must not take this process along."""

from __future__ import annotations

import glob
import os
import subprocess
import sys

from polyaccel.backend import Availability
from polyaccel_npu import cann, runtime
from polyaccel_npu.chip import chip_of

DEVICE_NODES = "/dev/davinci[0-9]*"
"""What the driver makes, one a card."""
PROBE_SECONDS = 60.0
_SCRIPT = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
INSTALL = "python -m pip install 'polyaccel[npu]'"
AUTOLOAD_HINT = (
    f"while it is installed on a machine without CANN, plain `import torch` fails unless {runtime.AUTOLOAD}=0 is set"
)


def probe() -> Availability:
    """Look for torch_npu without importing it, then import it: here where that was done before, else in a child."""
    nodes = sorted(glob.glob(DEVICE_NODES))
    if not runtime.installed():
        return Availability(usable=False, reason=f"torch_npu is not installed: {INSTALL}", hardware=bool(nodes))
    if "torch_npu" in sys.modules:
        try:
            npu = runtime.npu()
            names = tuple(str(npu.get_device_name(i)) for i in range(npu.device_count()))
            too_old = cann.refusal(cann.version(), cann.exports)
        except (ImportError, RuntimeError) as error:
            return unusable(f"{type(error).__name__}: {error}", bool(nodes))
        return available(names, bool(nodes), too_old)
    environment = {**os.environ, runtime.AUTOLOAD: "0"}
    try:
        child = subprocess.run(
            [sys.executable, "-c", _SCRIPT, cann.__file__],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return unusable(f"importing torch_npu in a child took more than {PROBE_SECONDS:g} s", bool(nodes))
    told = dict(line.partition(" ")[::2] for line in child.stdout.splitlines())
    if child.returncode or "DEVICES" not in told:
        return unusable(child.stderr or f"exit status {child.returncode}", bool(nodes))
    names = tuple(name.replace("_", " ") for name in told["DEVICES"].split())
    return available(names, bool(nodes), told.get("CANN", ""))


def available(names: tuple[str, ...], nodes: bool, too_old: str = "") -> Availability:
    """What follows from the devices that torch_npu shows. ``too_old``: why its CANN is refused."""
    if too_old:
        return Availability(usable=False, reason=too_old, hardware=nodes or bool(names), devices=names)
    if not names:
        missing = "its driver is loaded" if nodes else f"no driver: {DEVICE_NODES} matches nothing"
        return Availability(usable=False, reason=f"torch_npu finds no device ({missing})", hardware=nodes)
    for index, name in enumerate(names):
        refusal = chip_of(name).refusal
        if refusal:
            reason = f"device {index} ({name}): {refusal}"
            return Availability(usable=False, reason=reason, hardware=True, devices=names)
    return Availability(usable=True, hardware=True, devices=names)


def unusable(text: str, nodes: bool) -> Availability:
    """What is missing, from what the import said."""
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "unknown error")
    if "libhccl" in text or "libascendcl" in text or "libge_runner" in text or "libgraph" in text:
        cause = "CANN is missing or its set_env.sh was not sourced"
    elif "libascend_hal" in text or "driver" in text.lower():
        cause = "the Ascend driver is missing or does not match CANN"
    else:
        cause = "torch_npu cannot be imported"
    return Availability(usable=False, reason=f"{cause}: {last:.300}; {AUTOLOAD_HINT}", hardware=nodes)
