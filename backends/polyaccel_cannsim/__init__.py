"""CANN simulated in C and Python, so that the real torch_npu wheel runs on any x86-64 CPU.

``install()`` makes this process see simulated Ascend cards, ``python -m polyaccel_cannsim run -- python ...`` a
whole program; ``current()`` is the simulated machine of this process, ``current().ledger`` every call that
reached it. What the simulator shows and what it cannot
show: docs/ascend-simulator.md.
"""

from .process import current, install, installed

__all__ = ["current", "install", "installed"]
