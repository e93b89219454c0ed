"""``polyaccel.LLM``: the engine for synchronous callers."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from polyaccel.backend.backend import Backend
from polyaccel.backend.errors import ConfigurationError, RequestRejected
from polyaccel.backend.plan import Policy
from polyaccel.engine.adapters import Adapters
from polyaccel.engine.config import DType, EngineConfig, ExecutorKind
from polyaccel.engine.engine import Engine, LoadProgress, Message, Prompt
from polyaccel.engine.events import FinishEvent
from polyaccel.engine.explanation import Explanation, Health
from polyaccel.engine.loop import Event, NewRequest
from polyaccel.engine.outputs import Completion
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.engine.stream import DeltaStream, advance, raise_if_failed
from polyaccel.lora.mix import AdapterArgument

Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
AdapterPerPrompt = AdapterArgument | Sequence[AdapterArgument]
GenerateProgress = Callable[[int, int], None]


class LLM:
    """A model that answers. Use it as a context manager, or call :meth:`close`.

    Args:
        model: a folder, a .gguf file, or a hub id found in the local cache; nothing is ever downloaded.
        backend: an installed backend's name, "auto", or an instance.
        adapters: adapters to load at once, ``{name: folder}``.
        load_progress: called with bytes of weights read and to read.

    The other options are those of :class:`~polyaccel.engine.config.EngineConfig`.

    Raises:
        ConfigurationError, ModelNotFound, ModelLoadError, AdapterError, BackendUnavailable, OutOfMemory, EngineDead.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        backend: str | Backend = "auto",
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        layer_devices: Sequence[int] | None = None,
        dtype: DType = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_batched_tokens: int = 2048,
        memory_fraction: float = 0.9,
        kv_cache_bytes: int | None = None,
        prefix_caching: bool = True,
        overlap: bool = True,
        graphs: bool = True,
        adapter_slots: int = 8,
        adapter_rank_rows: int = 512,
        batch_invariant: bool = False,
        executor: ExecutorKind = "auto",
        policy: Policy = "warn",
        seed: int = 0,
        threads: int | None = None,
        timeout: float = 300.0,
        trace_collectives: bool = False,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        load_progress: LoadProgress | None = None,
    ) -> None:
        if expert_parallel_size != 1:
            raise ConfigurationError(
                f"expert_parallel_size={expert_parallel_size!r}: experts are cut by tensor only in this version; use 1"
            )
        config = EngineConfig(
            model=os.fspath(model),
            backend=backend if isinstance(backend, str) else backend.name,
            tensor_parallel_size=tensor_parallel_size,
            layer_devices=None if layer_devices is None else tuple(layer_devices),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            memory_fraction=memory_fraction,
            kv_cache_bytes=kv_cache_bytes,
            prefix_caching=prefix_caching,
            overlap=overlap,
            graphs=graphs,
            adapter_slots=adapter_slots,
            adapter_rank_rows=adapter_rank_rows,
            batch_invariant=batch_invariant,
            executor=executor,
            policy=policy,
            seed=seed,
            threads=threads,
            timeout=timeout,
            trace_collectives=trace_collectives,
        )
        self.engine = Engine(config, backend=None if isinstance(backend, str) else backend, load_progress=load_progress)
        try:
            for name, path in (adapters or {}).items():
                self.adapters.load(name, path)
        except BaseException:
            self.close()
            raise

    @property
    def adapters(self) -> Adapters:
        """Load, unload, list, pin and merge adapters."""
        return self.engine.adapters

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    # -- answering -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        adapter: AdapterPerPrompt = None,
        progress: GenerateProgress | None = None,
    ) -> list[Completion]:
        """Answer one prompt (a string or token ids) or a list of them, together.

        ``params`` and ``adapter`` are for all prompts, or lists with one a prompt. An adapter is a name, ``{name:
        weight}``, or None for the base model. Completions come in the order of the prompts; a request with ``n``
        choices gives n of them side by side. ``progress`` is called with completions done and in total.

        Raises:
            RequestRejected, RequestTooLong, AdapterNotFound: one of the requests is invalid; none has been started.
            EngineDead: the engine failed; the cause is attached.
        """
        batch = _as_batch(prompts)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        requests = [
            self.engine.new_request(prompt, p, a, streams=False, sink=events.put)
            for prompt, p, a in zip(
                batch,
                _per_prompt("params", list(params) if isinstance(params, tuple) else params, len(batch)),
                _per_prompt("adapter", adapter, len(batch)),
                strict=True,
            )
        ]
        if not requests:
            return []
        self.engine.loop.submit(requests)
        try:
            return self._collect(requests, events, progress)
        except BaseException:
            for request in requests:
                self.engine.loop.abort(request.request_id)
            raise

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: AdapterArgument = None
    ) -> DeltaStream:
        """Answer one prompt piece by piece. Closing the iterator, or dropping it, aborts the request.

        The request is validated and queued before this returns. The last delta of each choice carries its completion.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.engine.new_request(prompt, params, adapter, streams=True, sink=events.put)
        self.engine.loop.submit([request])
        return DeltaStream(self.engine, request, events)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        adapter: AdapterPerPrompt = None,
        progress: GenerateProgress | None = None,
        tools: Sequence[Message] | None = None,
        **template_variables: object,
    ) -> list[Completion]:
        """:meth:`generate` on one conversation, or a list of them, through the model's chat template."""
        conversations = _as_conversations(messages)
        prompts = [
            self.engine.chat_prompt(conversation, tools=tools, **template_variables) for conversation in conversations
        ]
        ids = [self._encode_chat(prompt) for prompt in prompts]
        return self.generate(ids, params, adapter=adapter, progress=progress)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: AdapterArgument = None,
        tools: Sequence[Message] | None = None,
        **template_variables: object,
    ) -> DeltaStream:
        """:meth:`stream` on a conversation through the model's chat template."""
        prompt = self.engine.chat_prompt(messages, tools=tools, **template_variables)
        return self.stream(self._encode_chat(prompt), params, adapter=adapter)

    # -- looking inside ------------------------------------------------------------------------------------------------

    def explain(self) -> Explanation:
        """The dispatch plan and what has been launched, on every rank."""
        return self.engine.explain()

    def health(self) -> Health:
        return self.engine.health()

    def close(self) -> None:
        """Abort what is left, free the device, stop the workers. Idempotent."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _encode_chat(self, prompt: str) -> list[int]:
        # The template writes the special tokens itself.
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer.encode(prompt, add_special_tokens=False)

    def _collect(
        self, requests: list[NewRequest], events: queue.SimpleQueue[Event], progress: GenerateProgress | None
    ) -> list[Completion]:
        order = {(r.request_id, c): i for i, (r, c) in enumerate((r, c) for r in requests for c in range(r.params.n))}
        assemblers = {(r.request_id, c): self.engine.assembler(r, c) for r in requests for c in range(r.params.n)}
        done: dict[int, Completion] = {}
        while len(done) < len(order):
            event = events.get()
            key = (event.request_id, event.choice)
            assembler = assemblers[key]
            if isinstance(event, FinishEvent):
                raise_if_failed(event)
                done[order[key]] = assembler.finish(event)[1]
                if progress is not None:
                    progress(len(done), len(order))
                continue
            advance(self.engine, assembler, event)
        return [done[index] for index in range(len(order))]


def _as_batch(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestRejected(f"prompts must be a string, token ids or a list of those, not {type(prompts).__name__}")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _as_conversations(messages: object) -> list[Sequence[Message]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestRejected(
            "messages must be a non-empty list of {'role': ..., 'content': ...} or a list of such lists"
        )
    if all(isinstance(item, Mapping) for item in messages):
        return [cast("Sequence[Message]", messages)]
    return list(cast("Sequence[Sequence[Message]]", messages))


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """One value a prompt: a list must have as many, anything else is for all."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestRejected(f"{name} has {len(value)} entries for {count} prompts")
    return value
