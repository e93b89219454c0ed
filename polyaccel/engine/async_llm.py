"""``polyaccel.AsyncLLM``: the same engine for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from polyaccel.engine.adapters import Adapters
from polyaccel.engine.engine import Message, Prompt
from polyaccel.engine.explanation import Explanation, Health
from polyaccel.engine.llm import LLM
from polyaccel.engine.loop import Event, NewRequest, Sink
from polyaccel.engine.outputs import Completion, Delta
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.engine.stream import next_delta
from polyaccel.lora.mix import AdapterArgument


class AsyncLLM:
    """Takes the options of :class:`~polyaccel.engine.llm.LLM`. Its methods may be called from one event loop or
    several.

    Loading the model blocks; construct it before the loop is busy, or in a thread. Cancelling a task, or closing an
    iterator, aborts its request.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self._llm = LLM(model, **options)

    @property
    def adapters(self) -> Adapters:
        """As ``LLM.adapters``; its methods block, so call them through ``asyncio.to_thread`` in a busy loop."""
        return self._llm.adapters

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: AdapterArgument = None
    ) -> list[Completion]:
        """Answer one prompt; one completion for each of the ``n`` choices, in order."""
        done: dict[int, Completion] = {}
        async for delta in self._deltas(prompt, params, adapter, streams=False):
            if delta.completion is not None:
                done[delta.index] = delta.completion
        return [done[index] for index in sorted(done)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: AdapterArgument = None
    ) -> AsyncGenerator[Delta, None]:
        """Answer one prompt piece by piece; the last delta of each choice carries its completion."""
        return self._deltas(prompt, params, adapter, streams=True)

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: AdapterArgument = None,
        tools: Sequence[Message] | None = None,
        **template_variables: object,
    ) -> list[Completion]:
        """:meth:`generate` on a conversation through the model's chat template."""
        return await self.generate(self._chat_ids(messages, tools, template_variables), params, adapter=adapter)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: AdapterArgument = None,
        tools: Sequence[Message] | None = None,
        **template_variables: object,
    ) -> AsyncGenerator[Delta, None]:
        """:meth:`stream` on a conversation through the model's chat template."""
        return self.stream(self._chat_ids(messages, tools, template_variables), params, adapter=adapter)

    def explain(self) -> Explanation:
        return self._llm.explain()

    def health(self) -> Health:
        return self._llm.health()

    def close(self) -> None:
        """As ``LLM.close``."""
        self._llm.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _chat_ids(
        self, messages: Sequence[Message], tools: Sequence[Message] | None, variables: dict[str, object]
    ) -> list[int]:
        engine = self._llm.engine
        prompt = engine.chat_prompt(messages, tools=tools, **variables)
        assert engine.tokenizer is not None
        return engine.tokenizer.encode(prompt, add_special_tokens=False)

    async def _deltas(
        self, prompt: Prompt, params: SamplingParams | None, adapter: AdapterArgument, *, streams: bool
    ) -> AsyncGenerator[Delta, None]:
        engine = self._llm.engine
        events: asyncio.Queue[Event] = asyncio.Queue()
        request = engine.new_request(prompt, params, adapter, streams=streams, sink=_into(events))
        assemblers = [engine.assembler(request, choice) for choice in range(request.params.n)]
        remaining = len(assemblers)
        await self._submit(request)
        try:
            while remaining:
                event = await events.get()
                delta = next_delta(engine, assemblers[event.choice], event)
                if delta is None:
                    continue
                if delta.completion is not None:
                    remaining -= 1
                yield delta
        finally:
            if remaining:
                engine.loop.abort(request.request_id)

    async def _submit(self, request: NewRequest) -> None:
        """Queue the request without blocking the event loop while a step runs."""
        submitting = asyncio.ensure_future(asyncio.to_thread(self._llm.engine.loop.submit, [request]))
        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:
            # The thread goes on: once it has queued the request, take it back.
            submitting.add_done_callback(self._taking_back(request))
            raise

    def _taking_back(self, request: NewRequest) -> Callable[[asyncio.Future[None]], None]:
        def take_back(submitted: asyncio.Future[None]) -> None:
            if not submitted.cancelled() and submitted.exception() is None:
                self._llm.engine.loop.abort(request.request_id)

        return take_back


def _into(events: asyncio.Queue[Event]) -> Sink:
    loop = asyncio.get_running_loop()

    def sink(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    return sink
