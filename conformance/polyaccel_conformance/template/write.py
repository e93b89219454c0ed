"""Writing a new backend's package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from polyaccel.backend import API_VERSION
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.template.files import FILES

NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
DEVICE = re.compile(r"[a-z][a-z0-9_]*")
TAKEN = ("auto", "cpu", "null")


def write_package(name: str, device: str, folder: Path) -> tuple[Path, ...]:
    """Write the package of backend ``name`` for torch devices of type ``device`` into ``folder``, a new folder.

    Returns the files written.

    Raises:
        UsageError: a name that cannot be a backend's, or the folder holds something already.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"backend name {name!r}: expected lower-case letters, digits and single dashes, such as 'acme'"
        )
    if name in TAKEN:
        raise UsageError(f"backend name {name!r} is taken by polyaccel itself")
    if not DEVICE.fullmatch(device):
        raise UsageError(f"device type {device!r}: expected what torch calls it, without an index, such as 'cuda'")
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(f"{folder} exists and is not empty")
    values = _values(name, device)
    written = []
    for path, text in FILES.items():
        target = folder / _filled(path, values)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_filled(text, values), encoding="utf-8")
        written.append(target)
    return tuple(written)


def _values(name: str, device: str) -> Mapping[str, str]:
    module = name.replace("-", "_")
    return {
        "@name@": name,
        "@device@": device,
        "@module@": module,
        "@Class@": "".join(part.capitalize() for part in re.split("[-_]", name)),
        "@VARIABLE@": f"{module.upper()}_DEVICE",
        "@api@": f"v{API_VERSION[0]}_{API_VERSION[1]}",
    }


def _filled(text: str, values: Mapping[str, str]) -> str:
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text
