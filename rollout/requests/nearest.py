"""The name that somebody meant who wrote another."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_MAX_CHARS = 200
_LIKE = 0.6


def nearest(name: str, known: Iterable[str], *, like: float = _LIKE) -> str | None:
    """The one of `known` most like `name`; None if none is like it.

    like: 0 to 1, how much of the two has to agree (`difflib`'s ratio); 0 takes any.
    """
    found = get_close_matches(name[:_MAX_CHARS], sorted(known), n=1, cutoff=like)
    return found[0] if found else None
