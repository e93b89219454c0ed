"""The core's random numbers, for the question whether draws by them follow the distribution that is asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def core_uniforms(
    seeds: npt.NDArray[np.uint64], choices: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """``[draws]`` numbers in [0, 1) for seeds, choices and positions of one shape, or broadcast to one."""
    from polyaccel.engine.philox import uniforms

    return np.asarray(uniforms(seeds, choices, positions), dtype=np.float64)
