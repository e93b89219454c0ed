"""Chat messages to prompt text, by a template that came with a checkpoint and is not trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polyaccel.backend.errors import ModelLoadError, RequestRejected

if TYPE_CHECKING:
    import jinja2

_MAX_SOURCE = 1 << 20
_MAX_DEPTH = 32
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class ChatTemplate:
    """One compiled chat template with the variables, filters and functions that Hugging Face templates expect.

    It runs in Jinja's immutable sandbox with limits on steps, sizes and time, sees only plain JSON-like data, and
    cannot reach files or Python objects. ``special_tokens`` maps names such as "bos_token" to their text. Raises
    ModelLoadError if the source is broken or uses what is not allowed.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for ``messages``; with ``add_generation_prompt`` it ends where the assistant's turn begins.

        Raises RequestRejected naming what is wrong: messages of the wrong form, data that is not JSON-like, a message
        the template itself refuses, or a template that fails or exceeds its limits on them.
        """
        _check_messages(messages)
        extra = dict(variables or {})
        for name in extra:
            if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
                raise RequestRejected(f"{name!r} cannot be a variable of a chat template")
        values = {
            **self._special_tokens,
            "messages": _plain(messages, "messages"),
            "tools": _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": bool(add_generation_prompt),
            **{name: _plain(value, name) for name, value in extra.items()},
        }
        from jinja2.exceptions import SecurityError, TemplateError

        from polyaccel.engine.template_sandbox import LimitExceeded, TemplateRefusal

        try:
            return self._template.render(values)
        except TemplateRefusal as cause:
            raise RequestRejected(f"the chat template refuses these messages: {str(cause)[:500]}") from cause
        except LimitExceeded as cause:
            raise RequestRejected(f"the chat template was stopped: {cause}") from cause
        except SecurityError as cause:
            raise RequestRejected(f"the chat template does what is not allowed: {str(cause)[:500]}") from cause
        except RecursionError as cause:
            raise RequestRejected("the chat template was stopped: it recurses without end") from cause
        except MemoryError as cause:
            raise RequestRejected("the chat template was stopped: it ran out of memory") from cause
        except TemplateError as cause:
            raise RequestRejected(f"the chat template fails on these messages: {str(cause)[:500]}") from cause
        except Exception as cause:  # a template's expressions can raise anything that Python's operators can
            what = f"{type(cause).__name__}: {str(cause)[:500]}"
            raise RequestRejected(f"the chat template fails on these messages ({what})") from cause


def _compile(source: str) -> jinja2.Template:
    if len(source) > _MAX_SOURCE:
        raise ModelLoadError(f"the chat template has {len(source)} characters, more than {_MAX_SOURCE}")
    from polyaccel.engine.template_sandbox import TemplateEnvironment

    try:
        return TemplateEnvironment().from_string(source)
    except (RecursionError, MemoryError) as cause:
        raise ModelLoadError("the chat template cannot be compiled: it is nested too deeply") from cause
    except Exception as cause:  # syntax errors are the package's own, but the generated code can fail as well
        raise ModelLoadError(f"the chat template cannot be compiled ({str(cause)[:500]})") from cause


def _check_messages(messages: object) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestRejected(f"messages is {type(messages).__name__}, expected a sequence of mappings")
    if not messages:
        raise RequestRejected("messages is empty; a chat needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestRejected(f"messages[{index}] is {type(message).__name__}, expected a mapping")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestRejected(f"messages[{index}]['role'] is {role!r}, expected a string such as 'user'")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise RequestRejected(
                f"messages[{index}]['content'] is {type(content).__name__}, expected a string or a list of parts"
            )


def _plain(value: object, where: str, depth: int = 0) -> object:
    """A copy made of plain JSON types, so that a template never holds an object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise RequestRejected(f"{where} is nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestRejected(f"{where} has the key {key!r}, expected strings")
        return {str.__str__(key): _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise RequestRejected(f"{where} is {type(value).__name__}, expected JSON-like data")
