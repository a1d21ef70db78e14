"""What ends a prompt program beside the errors of its requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import SlipstreamError


class BranchFailed(SlipstreamError):
    """One branch of a fork failed, and the others were ended: the message says which and why, and
    `__cause__` is its error."""


class ToolFailed(SlipstreamError):
    """A function that the model called raised, or the model was still calling after the last round
    that it had. Names the function, or the variable."""


class ToolRefused(Exception):
    """Raised by a function that is a tool, to tell the model what is wrong with its arguments: the
    message is the result of the call, and the program goes on."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of what is done within say which variable of the program they are about: `name` comes
    before the message and the field."""
    try:
        yield
    except (BranchFailed, ToolFailed):
        raise
    except SlipstreamError as error:
        field = f"{name}.{error.field}" if error.field else name
        raise type(error)(f"{name}: {error.message}", field=field) from error
