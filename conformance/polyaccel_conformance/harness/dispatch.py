"""A dispatch mode that costs no import of torch's compiler."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class PlainDispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Base of the suite's dispatch modes.

    By default torch keeps its compiler away from a mode's handler, and imports it for that when the handler is first
    called: two seconds in every process, though nothing is ever compiled here.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
