"""Text to tokens and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from polyaccel.backend.errors import ModelLoadError, PolyaccelError, RequestRejected
from polyaccel.engine.chat_template import ChatTemplate
from polyaccel.weights.json_file import read_json_object
from polyaccel.weights.locate import ModelFiles

if TYPE_CHECKING:
    import tokenizers

    from polyaccel.weights.gguf_file import GGUFFile

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_TEMPLATE = 1 << 20


class Tokenizer:
    """A model's vocabulary, special tokens and chat template. Safe for use from several threads.

    Attributes: ``bos_token_id`` (or None); ``eos_token_ids``, every id that the files say ends a generation;
    ``chat_template``, its source (or None); ``special_ids``, ascending, the ids that ``decode`` leaves out by default;
    ``is_byte_level``, whether each token stands for bytes (then ``token_bytes`` may be called).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        affixes: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """``special_tokens`` maps "bos_token" and the like to their text. ``affixes``, if given, are the ids to put
        before and after a text instead of what ``backend``'s own post-processor would."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = MappingProxyType(dict(special_tokens or {}))
        self._affixes = None if affixes is None else (list(affixes[0]), list(affixes[1]))
        added = backend.get_added_tokens_decoder()
        self.special_ids = tuple(sorted(index for index, token in added.items() if token.special))
        self._special = frozenset(self.special_ids)
        self.bos_token_id = self._id_of("bos_token")
        own_eos = self._id_of("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys((*(() if own_eos is None else (own_eos,)), *eos_token_ids)))
        self.chat_template = chat_template
        self._template: ChatTemplate | None = None
        steps = _decoder_steps(backend)
        self.is_byte_level = "ByteLevel" in steps
        self._has_byte_tokens = "ByteFallback" in steps
        self._byte_of = _byte_alphabet() if self.is_byte_level else {}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, files: ModelFiles) -> Tokenizer:
        """Load from a folder (``tokenizer.json`` and its companions) or from a GGUF file's metadata.

        Raises ModelLoadError for missing, damaged and unsupported files.
        """
        if files.kind == "gguf":
            from polyaccel.weights.gguf_file import GGUFFile

            return cls.from_gguf(GGUFFile(files.path))
        return _load_folder(files)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Build from an open GGUF file's metadata. Raises ModelLoadError."""
        from polyaccel.engine.gguf_tokenizer import adds_bos, build_gguf_tokenizer
        from polyaccel.weights.gguf_config import eos_token_ids

        backend = build_gguf_tokenizer(file)
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {
            name: file.integer(key)
            for name, part in names.items()
            if (key := f"tokenizer.ggml.{part}_token_id") in file.metadata
        }
        eos = eos_token_ids(file)
        tokens = {name: backend.id_to_token(index) if 0 <= index < 2**32 else None for name, index in ids.items()}
        for name, token in tokens.items():
            if token is None:
                raise ModelLoadError(f"{file.path}: {name} is id {ids[name]}, which is not in the vocabulary")
        _add_special(backend, [token for token in tokens.values() if token is not None])
        template = file.text("tokenizer.chat_template", "") or None
        before = [ids["bos_token"]] if adds_bos(file) and "bos_token" in ids else []
        after = [ids["eos_token"]] if file.flag("tokenizer.ggml.add_eos_token", False) and "eos_token" in ids else []
        return cls(
            backend,
            special_tokens={name: token for name, token in tokens.items() if token is not None},
            eos_token_ids=eos,
            chat_template=template,
            affixes=(before, after),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's own ``vocab_size`` may be larger (padding)."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens spelled out in it become their ids.

        ``add_special_tokens`` puts what the model expects around a text (such as its beginning-of-sequence token); pass
        False for rendered chat templates, which write it themselves. Raises RequestRejected if ``text`` is no valid
        Unicode string.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` for several texts at once, in parallel where that pays."""
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise RequestRejected(f"text {index} is {type(text).__name__}, expected a string")
            if not _is_unicode(text):
                raise RequestRejected(f"text {index} contains lone surrogates, which are no Unicode text")
        own = add_special_tokens and self._affixes is None
        with _translated("the text cannot be tokenised", RequestRejected):
            if len(texts) == 1:
                ids = [self._backend.encode(texts[0], add_special_tokens=own).ids]
            else:
                ids = [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=own)]
        if add_special_tokens and self._affixes is not None:
            before, after = self._affixes
            return [before + item + after for item in ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``. Ids without a token are left out, bytes that form no character become U+FFFD.

        Raises RequestRejected for anything that cannot be a token id.
        """
        with _translated("the ids cannot be decoded", RequestRejected):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, index: int) -> str | None:
        """The token as the vocabulary spells it, or None if there is none with this id."""
        with _translated(f"{index!r} is no token id", RequestRejected):
            token = self._backend.id_to_token(index)
        return None if token is None else str(token)

    def token_bytes(self, index: int) -> bytes:
        """The bytes a token of a byte-level vocabulary stands for; empty for an id without a token."""
        known = self._bytes.get(index)
        if known is None:
            known = self._bytes[index] = self._spell(self.token(index))
        return known

    def is_special(self, index: int) -> bool:
        """Whether ``decode`` leaves this id out by default."""
        return index in self._special

    def is_byte_token(self, index: int) -> bool:
        """Whether the token is one byte of a SentencePiece vocabulary, such as ``<0x0A>``."""
        token = self.token(index) if self._has_byte_tokens else None
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **variables: object,
    ) -> str:
        """Render ``messages`` with the model's chat template; encode the result with ``add_special_tokens=False``.

        Each message has a "role" and usually a "content". ``variables`` are handed to the template as they are.
        Raises RequestRejected for messages the template refuses and for models without a template, and ModelLoadError
        if the template itself is broken.
        """
        if self._template is None:
            if self.chat_template is None:
                raise RequestRejected("this model has no chat template; pass the prompt as text or set a template")
            self._template = ChatTemplate(self.chat_template, special_tokens=self._special_tokens)
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        index = None if token is None else self._backend.token_to_id(token)
        return None if index is None else int(index)

    def _spell(self, token: str | None) -> bytes:
        if token is None:
            return b""
        spelled = [self._byte_of.get(character) for character in token]
        # NOTE: a token with any character outside the byte alphabet is an added one and stands for its own text.
        return token.encode() if None in spelled else bytes(value for value in spelled if value is not None)


def _load_folder(files: ModelFiles) -> Tokenizer:
    import tokenizers

    path = files.file("tokenizer.json")
    if path is None:
        if files.file("tokenizer.model"):
            raise ModelLoadError(
                f"{files.path}: has tokenizer.model but no tokenizer.json; write one with "
                "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise ModelLoadError(f"{files.path}: has no tokenizer.json")
    with _translated(f"{path}: not a usable tokenizer", ModelLoadError):
        backend = tokenizers.Tokenizer.from_file(str(path))
    config = _json(files, "tokenizer_config.json")
    special = _special_tokens({**_json(files, "special_tokens_map.json"), **config})
    with _translated(f"{files.path}: its special tokens cannot be added", ModelLoadError):
        backend.add_tokens(_listed_tokens(config, backend))
        _add_special(backend, list(special.values()))
    affixes = None
    if any(isinstance(config.get(key), bool) for key in ("add_bos_token", "add_eos_token")):
        sides = []
        for key, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
            index = backend.token_to_id(special[name]) if config.get(key) is True and name in special else None
            sides.append([] if index is None else [int(index)])
        affixes = (sides[0], sides[1])
    eos = [*_ids(_json(files, "generation_config.json")), *_ids(_json(files, "config.json"))]
    return Tokenizer(
        backend,
        special_tokens=special,
        eos_token_ids=eos,
        chat_template=_template_source(files, config),
        affixes=affixes,
    )


def _add_special(backend: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Make the named tokens special, as transformers does, whatever the vocabulary says of them."""
    import tokenizers

    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])


def _json(files: ModelFiles, name: str) -> dict[str, object]:
    path = files.file(name)
    return {} if path is None else read_json_object(path)


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    special: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str) and value:
            special[name] = value
    return special


def _listed_tokens(config: Mapping[str, object], backend: tokenizers.Tokenizer) -> list[tokenizers.AddedToken]:
    import tokenizers

    listed = config.get("added_tokens_decoder")
    missing: dict[int, tokenizers.AddedToken] = {}
    for key, value in listed.items() if isinstance(listed, Mapping) else ():
        text = value.get("content") if isinstance(value, Mapping) else None
        if isinstance(text, str) and text and key.isdecimal() and backend.token_to_id(text) is None:
            options = {
                name: value.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word", "normalized")
            }
            missing[int(key)] = tokenizers.AddedToken(text, **options)
    return [missing[index] for index in sorted(missing)]


def _ids(config: Mapping[str, object]) -> list[int]:
    value = config.get("eos_token_id")
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and item >= 0]


def _template_source(files: ModelFiles, config: Mapping[str, object]) -> str | None:
    path = files.file("chat_template.jinja")
    if path is not None:
        return _read_text(path)
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {str(item.get("name")): item.get("template") for item in value if isinstance(item, Mapping)}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) and value else None


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEMPLATE:
            raise ModelLoadError(f"{path}: larger than {_MAX_TEMPLATE} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ModelLoadError(f"{path}: cannot be read ({cause})") from cause


def _decoder_steps(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    import json

    if backend.decoder is None:
        return ()
    state = json.loads(backend.decoder.__getstate__())
    return tuple(step["type"] for step in state.get("decoders", [state]))


def _byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level vocabularies (GPT-2's) spell the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _translated(what: str, error: type[PolyaccelError]) -> Iterator[None]:
    """Turn whatever the tokenizers package raises into ``error``; it knows only Exception and its Rust panics."""
    try:
        yield
    except PolyaccelError:
        raise
    except BaseException as cause:
        if isinstance(cause, Exception) or type(cause).__name__ == "PanicException":
            raise error(f"{what} ({str(cause)[:200]})") from cause
        raise
