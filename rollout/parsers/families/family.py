"""What a file of this folder says of its family."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import InvalidRequest
from rollout.parsers.calls import CallSyntax
from rollout.parsers.functions import Functions
from rollout.parsers.rules.lark import Lark

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

    syntax: reads them, given the functions that are offered. grammar: the expression of which
    texts are calls of these functions, one, or several if the last argument says so; raises
    InvalidRequest for functions that cannot be written. markers: the texts of the form that are
    single tokens of the family's models. special: whether those are special tokens, which text is
    decoded without unless they are asked for.
    """

    syntax: Callable[[Functions], CallSyntax]
    grammar: Callable[[Lark, Functions, bool], str]
    markers: tuple[str, ...] = ()
    special: bool = False
    new_id: Callable[[], str] = call_id


def check_name(name: str, pattern: re.Pattern[str]) -> None:
    """Refuse a name of a function or an argument that the family has no way to write."""
    if not pattern.fullmatch(name) or name != name.strip():
        raise InvalidRequest(
            f"{name[:100]!r} cannot be written in the form of this model's calls; give tools and "
            "their arguments names of letters, digits, '_' and '-'",
            field="tools",
        )
