"""On PYTHONPATH of a program under the simulator. Runs before it; then the sitecustomize that this one hides."""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_here = Path(__file__).resolve().parent

if os.environ.get("CANNSIM_ACTIVE") == "1":
    from polyaccel_cannsim.hook import arm

    arm()

_others = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
