"""Ids of the samples of a request, which no client's own id can equal.

A client's id is printable; within ours, a mark stands before the number of a sample. Replies show
it as a dash, and so does whoever aborts write it.
"""

from __future__ import annotations

import os

from engine.errors import InvalidRequest

_MARK = "\0"


def fresh_id() -> str:
    """An id that nobody has, of 32 hexadecimal digits: 16 bytes of the operating system's."""
    return os.urandom(16).hex()


def sample_id(group: str, number: int) -> str:
    """The id of sample `number` of a request."""
    return f"{group}{_MARK}{number}"


def shown(rid: str) -> str:
    """The id as replies show it."""
    return rid.replace(_MARK, "-")


def of_call(rid: str) -> str:
    """The id of the call that a sample is of, as its reply has it."""
    return rid.partition(_MARK)[0]


def starts_with(rid: str, prefix: str) -> bool:
    """Whether a client that names `prefix` means `rid` too."""
    return rid.startswith(prefix) or (_MARK in rid and shown(rid).startswith(prefix))


def in_group(rid: str, group: str) -> bool:
    """Whether `rid` is the id of a sample of the request, or the call, that is called `group`."""
    return rid.startswith(group + _MARK)


def of_sample(name: str) -> str:
    """The id of the sample that replies show as `name`; `name` if there can be none."""
    group, dash, number = name.rpartition("-")
    return sample_id(group, int(number)) if dash and _is_number(number) else name


def check_client_id(rid: str | None, field: str) -> None:
    """Raise InvalidRequest for a client's id that holds the mark."""
    if rid is not None and _MARK in rid:
        raise InvalidRequest(f"{field} holds the character NUL; leave it out", field=field)


def _is_number(text: str) -> bool:
    canonical = text == "0" or not text.startswith("0")
    return canonical and text.isascii() and text.isdecimal() and len(text) < 12
