"""Panics of llguidance as exceptions that boundaries catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Panic(Exception):
    """An assertion of llguidance failed; what it was about is not to be used again."""


def contained(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What `call` into llguidance returns. Raises Panic where it panics: PyO3 raises that as a
    class that is no `Exception`, so that it would end the thread, and whoever asks for its result,
    past every handler."""
    try:
        return call(*args, **options)
    except Exception:
        raise
    except BaseException as error:
        # The class has no name that could be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise Panic(f"llguidance failed: {str(error)[:500]}") from error
