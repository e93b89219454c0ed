"""Makes this process see simulated cards, and its children too."""

from __future__ import annotations

import atexit
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import NotInstalled

if TYPE_CHECKING:
    from .registry import Rule
    from .simulator import Simulator

_HOLDER = "polyaccel_cannsim._process"
"""The libraries are loaded into the process, once; so what belongs to them hangs on the process's module table."""
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
ACTIVE = "CANNSIM_ACTIVE"
"""Set to 1 in the environment, the folder ``site`` on PYTHONPATH makes ``import torch_npu`` install the simulator."""


def current() -> Simulator:
    """The simulated machine of this process.

    Raises:
        NotInstalled: there is none.
    """
    holder = sys.modules.get(_HOLDER)
    if holder is None:
        raise NotInstalled(
            "CANN is not simulated in this process; call polyaccel_cannsim.install() before importing torch_npu"
        )
    found: Simulator = holder.simulator
    return found


def installed() -> bool:
    return _HOLDER in sys.modules


def install(
    *,
    devices: int | None = None,
    soc: str | None = None,
    cann: str | None = None,
    memory: str | None = None,
    children: bool = True,
) -> Simulator:
    """Loads the simulated libraries and then torch_npu on top of them. A second call returns what is there.

    Args:
        devices, soc, cann, memory: override ``CANNSIM_DEVICES``, ``CANNSIM_SOC``, ``CANNSIM_CANN``, ``CANNSIM_MEMORY``.
        children: whether Python processes started from here are to see the same machine.

    Raises:
        NotInstalled: torch_npu was imported already, or is not installed; or another machine is in this process.
        CompilerMissing, BuildFailed: the libraries could not be built.
        SettingError: a setting cannot work.
    """
    given = {"CANNSIM_DEVICES": devices, "CANNSIM_SOC": soc, "CANNSIM_CANN": cann, "CANNSIM_MEMORY": memory}
    values = {name: str(value) for name, value in given.items() if value is not None}
    if installed():
        _check_same(current(), values)
        return current()
    if children:
        os.environ.update(values)
        os.environ.update(child_environment(os.environ))
    found = prepare(values)
    importlib.import_module("torch_npu")
    finish()
    return found


def _check_same(machine: Simulator, values: dict[str, str]) -> None:
    from .settings import Settings

    wanted = Settings.from_environment({**os.environ, **values})
    for name in ("devices", "soc", "cann", "memory"):
        there, asked = getattr(machine.settings, name), getattr(wanted, name)
        if f"CANNSIM_{name.upper()}" in values and there != asked:
            raise NotInstalled(
                f"this process has simulated cards with {name} {there} already: {asked} needs a new process"
            )


def prepare(overrides: dict[str, str] | None = None) -> Simulator:
    """Builds and loads the libraries and fills their functions; torch_npu must not be imported yet."""
    if installed():
        return current()
    if "torch_npu" in sys.modules and getattr(sys.modules["torch_npu"], "__version__", None):
        raise NotInstalled("torch_npu is imported already: install the simulator first")
    if importlib.util.find_spec("torch_npu") is None:
        raise NotInstalled("torch_npu is not installed here; pip install 'polyaccel[npu-sim]'")
    _import_torch()
    from .build import Names, build
    from .registry import exported
    from .settings import Settings
    from .simulator import Simulator

    settings = Settings.from_environment({**os.environ, **(overrides or {})})
    rules = exported(all_rules(settings.rules), settings.cann)
    names = Names(
        tuple(sorted(name for name, rule in rules.items() if rule.library == "opapi")),
        tuple(sorted(name for name, rule in rules.items() if rule.library == "hccl")),
    )
    folder = build(names, importlib.metadata.version("torch-npu"))
    found = Simulator(settings, rules, folder)
    holder = types.ModuleType(_HOLDER)
    holder.simulator = found  # type: ignore[attr-defined]
    sys.modules[_HOLDER] = holder
    # Its warnings name the aclnn functions that it looks for in vain.
    os.environ.setdefault("ASCEND_GLOBAL_LOG_LEVEL", "2")
    if settings.ledger is not None:
        path = settings.ledger.with_name(f"{settings.ledger.name}.{os.getpid()}")
        atexit.register(found.ledger.write, path)
    atexit.register(found.shutdown)  # runs after torch_npu's own farewell, which is registered later
    return found


def all_rules(packages: Sequence[str]) -> list[Rule]:
    """Every operator and collective that the packages describe, for all CANN versions. Imports torch."""
    _import_torch()
    from .registry import collect

    return [rule for package in packages for rule in collect(package)]


def finish() -> None:
    """What needs torch_npu: the allow-listed aten operators, and an orderly end."""
    from . import aten

    found = current()
    if not found.release_python_in_waits():
        raise NotInstalled("torch_npu waits for its queue in a way that this simulator does not know: is it 2.13?")
    aten.install(found)


def child_environment(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Variables that make Python children see the machine that the other ``CANNSIM_*`` variables describe."""
    package = Path(__file__).resolve().parent
    here = [str(package / "site"), str(package.parent)]
    rest = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part and part not in here]
    # Said aloud, so that nobody switches it off because there is no CANN to be found before torch_npu is imported.
    autoload = environment.get(_AUTOLOAD, "1")
    return {ACTIVE: "1", _AUTOLOAD: autoload, "PYTHONPATH": os.pathsep.join([*here, *rest])}


def _import_torch() -> None:
    """torch without its autoload, which would import torch_npu too early."""
    if "torch" in sys.modules:
        return
    before = os.environ.get(_AUTOLOAD)
    os.environ[_AUTOLOAD] = "0"
    try:
        importlib.import_module("torch")
    finally:
        if before is None:
            del os.environ[_AUTOLOAD]
        else:
            os.environ[_AUTOLOAD] = before
