"""``batch_invariant`` is a backend's promise: who cannot make it says so before anything is loaded."""

from __future__ import annotations

import pytest

from polyaccel.backend.errors import ConfigurationError
from tests.support.tiny_model import TinyModel


def test_a_backend_that_cannot_promise_it_refuses_to_start(tiny: TinyModel) -> None:
    with pytest.raises(ConfigurationError, match=r"backend '.*' cannot promise .* leave out batch_invariant"):
        tiny.open(batch_invariant=True)
