"""Refuse a prompt that is too long by its bytes, before the body around it is decoded.

A decoder holds the interpreter for as long as it takes, which for tens of megabytes is longer
than a health check should wait.
"""

from __future__ import annotations

import re

from engine.errors import ContextTooLong, InvalidRequest

_LONG_BYTES = 1 << 20
_HEAD_BYTES = 4096
_WINDOW_BYTES = 1 << 20

# A quote within text is escaped, so what stands after a brace or a comma is a key.
_PROMPT = re.compile(
    rb'[{,]\s*"(text|input_ids|prompt|token_ids|input|tokens)"\s*:\s*(?:(")|\[\s*[-\d])'
)


def check_long_prompt(body: bytes, *, text_bytes: int, num_ids: int) -> None:
    """Look at the prompt of a body of more than `_LONG_BYTES`, if it is one prompt, in a field
    that a route has for it, and begins within the first `_HEAD_BYTES`; anything else is left to
    the decoder.

    text_bytes: of the longest text that may be sent, 0 for a model without text. num_ids: of the
    context. Raises ContextTooLong, InvalidRequest.
    """
    if len(body) <= _LONG_BYTES:
        return
    found = _PROMPT.search(body[:_HEAD_BYTES])
    if found is None:
        return
    field = found.group(1).decode()
    if found.group(2):
        _check_text(body, found.end(), text_bytes, num_ids, field)
    else:
        _check_ids(body, found.end(), num_ids, field)


def _check_text(body: bytes, start: int, text_bytes: int, num_ids: int, field: str) -> None:
    if not text_bytes:
        raise InvalidRequest("this model came without a tokenizer; send ids", field=field)
    # A byte of text is at most six of JSON.
    limit = start + 6 * text_bytes
    end = body.find(b'"', start, limit + 1)
    while end >= 0 and _is_escaped(body, end, start):
        end = body.find(b'"', end + 1, limit + 1)
    if end < 0 and len(body) > limit:
        raise ContextTooLong(
            f"{field} has more than {6 * text_bytes} bytes, more than {num_ids} tokens can hold; "
            "shorten it",
            field=field,
        )


def _is_escaped(body: bytes, quote: int, start: int) -> bool:
    """Whether an odd number of backslashes stands before a quote."""
    before = quote
    while before > start and body[before - 1] == 0x5C:
        before -= 1
    return bool((quote - before) % 2)


def _check_ids(body: bytes, start: int, num_ids: int, field: str) -> None:
    commas = 0
    for begin in range(start, len(body), _WINDOW_BYTES):
        stop = min(begin + _WINDOW_BYTES, len(body))
        end = body.find(b"]", begin, stop)
        commas += body.count(b",", begin, stop if end < 0 else end)
        if commas + 1 > num_ids:
            raise ContextTooLong(
                f"{field} has {commas + 1} tokens or more, too many for a context of {num_ids}; "
                "shorten the prompt",
                field=field,
            )
        if end >= 0:
            return
