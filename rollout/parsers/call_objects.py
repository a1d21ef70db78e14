"""Calls that are written as a JSON object with a name and arguments."""

from __future__ import annotations

from rollout.parsers.calls import CallReader
from rollout.parsers.json_text import is_object, read_text, read_value
from rollout.parsers.source import NotACall, Source, Steps

_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("id", "type")


def read_call_object(call: CallReader) -> Steps[None]:
    """Take one `{"name": ..., "arguments": {...}}`, keys in any order; `parameters` are arguments
    too, and without any there are none. Raises NotACall where it is something else."""
    source = call.source
    name: str | None = None
    found: list[str] | None = None
    yield from source.need("{")
    separator = ","
    while separator == ",":
        key = yield from _read_key(source)
        if key == "name" and name is None:
            name = yield from read_text(source)
        elif key in _ARGUMENTS and found is None:
            found = []
            if name is None:
                yield from read_value(source, found.append)
            else:
                yield from read_arguments(call, name)
        elif key in _OTHERS or (name is not None and key not in ("name", *_ARGUMENTS)):
            yield from read_value(source, _drop)
        else:
            raise NotACall
        separator = yield from source.need(",", "}")
    if name is None:
        raise NotACall
    if not call.is_begun:
        _give(call, name, "".join(found or ["{}"]))
    call.end()


def read_arguments(call: CallReader, name: str) -> Steps[None]:
    """Take the arguments of `name`: an object, the text of one as a string, or null."""
    char = yield from call.source.peek()
    if char == "{":
        call.begin(name)
        yield from read_value(call.source, call.arguments)
        return
    pieces: list[str] = []
    yield from read_value(call.source, pieces.append)
    _give(call, name, "".join(pieces))


def _give(call: CallReader, name: str, text: str) -> None:
    """A call whose arguments are all there: an object, the text of one as a string, or null."""
    if text == "null":
        text = "{}"
    elif text.startswith('"'):
        source = Source()
        source.push(text)
        text = _finished(read_text(source))
    if not is_object(text):
        raise NotACall
    call.begin(name)
    call.arguments(text)


def _finished(steps: Steps[str]) -> str:
    """What steps that need not wait return."""
    try:
        next(steps)
    except StopIteration as done:
        text: str = done.value
        return text
    raise NotACall


def _read_key(source: Source) -> Steps[str]:
    yield from source.spaces()
    key = yield from read_text(source)
    yield from source.need(":")
    yield from source.spaces()
    return key


def _drop(text: str) -> None:
    """Text that says nothing of the call."""
