"""A backend of several virtual devices on the CPU, with the manners of real ones.

The current device is a property of the thread, work waits in streams, a kernel that touches another device's memory
fails later and for good. A missing guard, a missing event or the default stream shows here as it does on hardware.
"""

from polyaccel_conformance.simulated.backend import SimulatedBackend
from polyaccel_conformance.simulated.device import SimulatedDevice
from polyaccel_conformance.simulated.runtime import Runtime

__all__ = ["Runtime", "SimulatedBackend", "SimulatedDevice"]
