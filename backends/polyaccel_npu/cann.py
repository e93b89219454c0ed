"""Which CANN is behind torch_npu, and whether it is new enough.

Nothing here but the standard library is imported before it is asked, so that a child process can run this file alone.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
from collections.abc import Callable, Mapping

OLDEST = "8.0.RC2"
"""The fused products are documented from this CANN and its driver on; before, MatmulAllReduce ends in BUS ERROR."""
SINCE_OLDEST = "aclnnFusedInferAttentionScoreV2"
"""A function that every CANN from the oldest one on exports: asked for where no version is to be had."""
INSTALL_FILES = ("ascend_*_install.info", os.path.join("*", "ascend_*_install.info"))
"""Where below ASCEND_HOME_PATH the packages note their versions."""
_VERSION = re.compile(r"(\d+)\.(\d+)\.(RC|T)?(\d+)", re.IGNORECASE)
Exports = Callable[[str], bool]


def key(version: str) -> tuple[int, int, bool, int] | None:
    """What versions are ordered by: a release candidate (``8.0.RC2``, ``8.0.RC2.alpha001``) comes before its release
    (``8.0.0``). None for what is no version."""
    found = _VERSION.match(version.strip())
    return None if found is None else (int(found[1]), int(found[2]), found[3] is None, int(found[4]))


def refusal(version: str, exports: Exports) -> str:
    """Why the backend does not run on this CANN; empty if it does.

    Args:
        version: empty, or no version at all, where it is not known: the exported functions then decide.
        exports: whether CANN has an aclnn function.
    """
    have, least = key(version), key(OLDEST)
    assert least is not None
    if have is None and not exports(SINCE_OLDEST):
        return f"CANN is older than {OLDEST}, the oldest that works here (its libopapi.so has no {SINCE_OLDEST})"
    if have is not None and have < least:
        return f"CANN {version.strip()} is older than {OLDEST}, the oldest that works here"
    return ""


def version(environment: Mapping[str, str] = os.environ) -> str:
    """CANN's version as torch_npu knows it, which it does from CANN 8.1 on, or as its package noted it; empty where
    neither is to be had. torch_npu must be imported."""
    from torch_npu.npu.utils import get_cann_version

    try:
        told = str(get_cann_version() or "")
    except RuntimeError:
        told = ""
    return told if key(told) is not None else installed(environment)


def installed(environment: Mapping[str, str]) -> str:
    """The version that the packages below ASCEND_HOME_PATH noted; empty without."""
    home = environment.get("ASCEND_HOME_PATH", "")
    for pattern in INSTALL_FILES if home else ():
        for path in sorted(glob.glob(os.path.join(glob.escape(home), pattern))):
            with open(path, encoding="utf-8", errors="replace") as file:
                noted = dict(line.strip().partition("=")[::2] for line in file)
            if key(noted.get("version", "")) is not None:
                return noted["version"].strip()
    return ""


def exports(function: str) -> bool:
    """Whether the libopapi.so that torch_npu loads has an aclnn function."""
    try:
        return hasattr(ctypes.CDLL("libopapi.so"), f"{function}GetWorkspaceSize")
    except OSError:
        return False


def main() -> None:
    """What the probe wants to know, a line each."""
    import torch
    import torch_npu  # noqa: F401

    npu = torch.npu  # type: ignore[attr-defined]
    print("CANN", refusal(version(), exports))
    print("DEVICES", *(str(npu.get_device_name(i)).replace(" ", "_") for i in range(npu.device_count())))


if __name__ == "__main__":
    main()
