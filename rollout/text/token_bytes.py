"""The bytes that a token stands for, whatever the tokenizer's decoder.

A character may need several tokens, so a token alone is bytes, and text only where those bytes
are UTF-8. Three kinds of decoders exist among the families served: byte-level BPE writes a
printable character for every byte (Radford et al., GPT-2); SentencePiece writes a space as "▁",
drops the one that begins a text, and has a token `<0xAB>` for each byte (byte fallback: Kudo and
Richardson, arXiv 1808.06226); the rest, with WordPiece and no decoder at all, is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from engine.errors import ModelError

_CONTEXT_FREE = frozenset({"ByteFallback", "Fuse", "Replace", "Strip", "Metaspace", "WordPiece"})
"""Decoders under which a token adds the same bytes everywhere but at the beginning of a text."""

_ANCHOR = "x"
"""A token before the one that is looked at, so that it does not begin a text."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_OTHER_SPELLINGS = re.compile(r"bytes:(\\x[0-9a-f]{2})+|token_id:\d+")


class TokenBytes:
    """Bytes by token id of one tokenizer. Raises ModelError (`decoder`) for a decoder whose
    tokens have no bytes of their own."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps = list(_steps(backend.decoder))
        kinds = {step["type"] for step in steps}
        self._backend = backend
        self._to_byte = _byte_alphabet() if "ByteLevel" in kinds else {}
        self._falls_back = "ByteFallback" in kinds
        unknown = kinds - ({"ByteLevel", "Fuse"} if self._to_byte else _CONTEXT_FREE)
        if unknown:
            served = ", ".join(["ByteLevel", *sorted(_CONTEXT_FREE)])
            raise ModelError(
                f"tokenizer.json has the decoder {' and '.join(sorted(kinds))}, under which tokens "
                f"have no bytes of their own; served are {served}",
                field="decoder",
            )
        added = backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._whole = _Table(self._of)
        self._first = _Table(self._of_first)
        self._shown = _Table(self._of_shown)

    def added(self, *, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """By id, what a token adds to a text that goes on: nothing where it is not shown."""
        return self._shown if skip_special_tokens else self._whole

    def of(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes of a token; none for an id beyond the vocabulary. first: where it begins a
        text, which SentencePiece writes without its space."""
        return (self._first if first else self._whole)[token_id]

    def is_shown(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether a token is part of the text at all."""
        token = self._backend.id_to_token(token_id)
        return token is not None and not (skip_special_tokens and token in self._special)

    def _of(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._bytes(token, False)

    def _of_first(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._bytes(token, True)

    def _of_shown(self, token_id: int) -> bytes:
        shown = self.is_shown(token_id, skip_special_tokens=True)
        return self._whole[token_id] if shown else b""

    def _bytes(self, token: str, first: bool) -> bytes:
        if self._to_byte:
            values = [self._to_byte.get(char) for char in token]
            # Added tokens may hold characters outside the alphabet; they stand for themselves.
            plain = [value for value in values if value is not None]
            return bytes(plain) if len(plain) == len(values) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._falls_back else None
        if byte is not None and int(byte[1], 16) >= 0x80:
            return bytes([int(byte[1], 16)])
        return (self._decode([token]) if first else self._after_anchor(token)).encode()

    def _after_anchor(self, token: str) -> str:
        return self._decode([_ANCHOR, token]).removeprefix(self._decode([_ANCHOR]))

    def _decode(self, tokens: list[str]) -> str:
        decoder = self._backend.decoder
        if decoder is None:
            return " ".join(tokens)
        text: str = decoder.decode(tokens)
        return text


class _Table(dict[int, bytes]):
    """Bytes by token id, each found when it is first asked for; at most the vocabulary's."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._find(token_id)
        return found


def spelled(raw: bytes) -> str:
    r"""The bytes of a token as a string, no two alike: their text where they are UTF-8, else
    `bytes:\xf0\x9f`, the spelling of OpenAI's completions. A text that is itself written like
    that, or like `token_id:7`, is spelled by its bytes."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = ""
    if (raw and not text) or _OTHER_SPELLINGS.fullmatch(text):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return text


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """The decoders that `decoder` consists of, in order; none for None."""
    if decoder is None:
        return
    waiting: list[dict[str, Any]] = [json.loads(decoder.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        inner: Sequence[dict[str, Any]] = step.get("decoders", ())
        if step["type"] == "Sequence":
            waiting[:0] = inner
        else:
            yield step


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character of every byte, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
