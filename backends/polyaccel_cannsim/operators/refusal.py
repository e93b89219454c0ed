"""How a simulated `aclnn*` function says no: CANN's status codes, and its kind of text.

Codes: hicann/ops-nn docs/zh/context/aclnn_return_code.md; each interface's own page lists which ones it returns.
"""

from __future__ import annotations

from ..errors import Refused

NULL_POINTER = 161001  # ACLNN_ERR_PARAM_NULLPTR
INVALID = 161002  # ACLNN_ERR_PARAM_INVALID
INNER = 561000  # ACLNN_ERR_INNER
TILING = 561002  # ACLNN_ERR_INNER_TILING_ERROR


class Refusal(Refused):
    """An aclnn stage failed with one of the codes above; `text` is the reason with the values seen."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text, "EZ1001" if code in (NULL_POINTER, INVALID) else "EZ9999")


class NotSimulated(Refusal):
    """Legal on a card as far as the documents say, but the simulator has no model of it: never a silent guess."""

    def __init__(self, function: str, what: str) -> None:
        super().__init__(INNER, f"cannsim does not simulate {what} of {function}")


def null(name: str) -> Refusal:
    """A required argument is a null pointer."""
    return Refusal(NULL_POINTER, f"Expected a proper Tensor but got null for argument {name}.")


def invalid(text: str) -> Refusal:
    """An argument breaks a rule that the first stage checks."""
    return Refusal(INVALID, text)


def tiling(text: str) -> Refusal:
    """An argument breaks a rule that only the tiling of the kernel checks."""
    return Refusal(TILING, text)


def inner(text: str) -> Refusal:
    """The kernel's launch failed."""
    return Refusal(INNER, text)
