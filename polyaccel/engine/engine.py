"""Putting an engine together, and turning what callers pass into requests. Shared by LLM and AsyncLLM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from polyaccel.backend import registry
from polyaccel.backend.backend import Backend
from polyaccel.backend.errors import ConfigurationError, RequestRejected
from polyaccel.engine.adapter_manager import AdapterManager
from polyaccel.engine.adapters import Adapters
from polyaccel.engine.assembler import ChoiceAssembler
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.core import EngineCore
from polyaccel.engine.executor import Executor
from polyaccel.engine.explanation import Explanation, Health
from polyaccel.engine.inline_executor import InlineExecutor
from polyaccel.engine.loop import EngineLoop, NewRequest, Sink
from polyaccel.engine.process_executor import ProcessExecutor
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.lora.mix import AdapterArgument, normalise_mix
from polyaccel.models.config import ModelConfig
from polyaccel.parallel.cut import head_cut
from polyaccel.weights.checkpoint import open_checkpoint
from polyaccel.weights.locate import ModelFiles, locate_model

if TYPE_CHECKING:
    from polyaccel.engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, object]
LoadProgress = Callable[[int, int], None]


class Engine:
    """Everything behind LLM and AsyncLLM: workers, core, adapters, tokenizer.

    Args:
        config: validated options.
        backend: an instance to use instead of the one that ``config.backend`` names; then the executor is inline.
        load_progress: called with bytes of weights done and in total.
    """

    def __init__(
        self, config: EngineConfig, *, backend: Backend | None = None, load_progress: LoadProgress | None = None
    ) -> None:
        self.files = locate_model(config.model)
        with open_checkpoint(self.files) as checkpoint:
            self.model_config = ModelConfig.from_hf(checkpoint.hf_config(), checkpoint.generation_config())
        self.tokenizer = _tokenizer(self.files)
        if backend is not None and (config.tensor_parallel_size > 1 or config.executor == "process"):
            raise ConfigurationError(
                "a Backend instance runs inline with one rank; pass the backend's name for several"
            )
        head_cut(self.model_config.num_heads, self.model_config.num_kv_heads, config.tensor_parallel_size, 0)
        self.executor, self.config = _start(config, backend, load_progress)
        try:
            self.adapter_manager = AdapterManager(self.executor, on_change=lambda: self.core.clear_prefix_cache())
            self.core = EngineCore(
                self.executor,
                self.adapter_manager if self.executor.capacity.adapter_slots else None,
                overlap=self.config.overlap,
                max_batched_tokens=self.config.max_batched_tokens,
                prefix_caching=self.config.prefix_caching,
                eos_token_ids=self._eos_token_ids(),
                seed=self.config.seed,
            )
            self.loop = EngineLoop(self.core, self.adapter_manager)
        except BaseException:
            self.executor.close()
            raise
        self.adapters = Adapters(self.loop, self.adapter_manager, self.executor)
        self._ids = itertools.count()

    # -- requests ------------------------------------------------------------------------------------------------------

    def new_request(
        self, prompt: Prompt, params: SamplingParams | None, adapter: AdapterArgument, *, streams: bool, sink: Sink
    ) -> NewRequest:
        """Validate what a caller passed and tokenise it; the engine does not know of it yet.

        Raises:
            RequestRejected: a prompt or adapter of the wrong kind, an empty prompt, an id outside the vocabulary.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestRejected(f"params must be a SamplingParams, not {type(params).__name__}")
        if params.stop and self.tokenizer is None:
            raise RequestRejected(
                f"model {self.config.model!r} has no tokenizer, so stop strings cannot be watched for"
            )
        return NewRequest(
            request_id=f"request-{next(self._ids)}",
            prompt=self._prompt_ids(prompt),
            params=params,
            mix=normalise_mix(adapter),
            watched=streams or bool(params.stop),
            sink=sink,
        )

    def assembler(self, request: NewRequest, choice: int) -> ChoiceAssembler:
        return ChoiceAssembler(self.tokenizer, request.params, choice, watched=request.watched)

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Message] | None = None, **variables: object
    ) -> str:
        """The prompt of a conversation by the model's chat template.

        Raises:
            RequestRejected: the model has no template, or the template refuses the messages.
        """
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise RequestRejected(f"model {self.config.model!r} has no chat template; use generate with a prompt")
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools, **variables)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids: list[int]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestRejected(f"model {self.config.model!r} has no tokenizer; pass token ids")
            ids = self.tokenizer.encode(prompt)
        elif _are_ids(prompt):
            ids = [int(i) for i in prompt]
        else:
            raise RequestRejected(f"a prompt is a string or a sequence of token ids, not {type(prompt).__name__}")
        if not ids:
            raise RequestRejected("the prompt is empty: it has no tokens")
        vocabulary = self.executor.capacity.vocabulary
        outside = next((i for i in ids if not 0 <= i < vocabulary), None)
        if outside is not None:
            raise RequestRejected(f"token id {outside} of the prompt is outside the vocabulary of {vocabulary}")
        return ids

    def _eos_token_ids(self) -> tuple[int, ...]:
        known = list(self.model_config.eos_token_ids)
        if self.tokenizer is not None:
            known += self.tokenizer.eos_token_ids
        return tuple(dict.fromkeys(known))

    # -- the rest ------------------------------------------------------------------------------------------------------

    def explain(self) -> Explanation:
        return Explanation(self.loop.call(self.executor.explain))

    def health(self) -> Health:
        return Health.of(self.loop, self.executor)

    def close(self) -> None:
        """Abort what is left, stop the threads and the workers. Idempotent."""
        self.loop.close()
        self.executor.close()
        self.adapter_manager.close()


def _start(
    config: EngineConfig, backend: Backend | None, progress: LoadProgress | None
) -> tuple[Executor, EngineConfig]:
    chosen = backend if backend is not None else registry.choose(config.backend)
    several = config.tensor_parallel_size > 1
    kind = config.executor
    if kind == "auto":
        kind = "process" if several or (backend is None and chosen.isolate) else "inline"
    config = replace(config, backend=chosen.name, executor=kind)
    if kind == "process":
        chosen.close()
        return ProcessExecutor(config, progress), config
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    return InlineExecutor(config, chosen, progress), config


def _are_ids(prompt: object) -> bool:
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) for item in prompt)


def _tokenizer(files: ModelFiles) -> Tokenizer | None:
    from polyaccel.engine.tokenizer import Tokenizer

    if files.kind == "folder" and files.file("tokenizer.json") is None:
        return None
    return Tokenizer.load(files)
