"""What a file of this folder says of its family."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from rollout.parsers.calls import CallSyntax
from rollout.parsers.functions import Functions

_SHORT = string.ascii_letters + string.digits


def call_id() -> str:
    """A new id of a call, in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """A new id of nine letters and digits, the only form that templates of Mistral take."""
    return "".join(secrets.choice(_SHORT) for _ in range(9))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way to write calls.

    syntax: reads them, given the functions that are offered. markers: the texts of the form that
    are single tokens of the family's models. special: whether those are special tokens, which
    text is decoded without unless they are asked for.
    """

    syntax: Callable[[Functions], CallSyntax]
    markers: tuple[str, ...] = ()
    special: bool = False
    new_id: Callable[[], str] = call_id
