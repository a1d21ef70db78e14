"""Replies through a parser, in pieces, and what the events add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rollout.parsers.events import CallArguments, CallBegin, Event, collect
from rollout.parsers.formats import ReplyFormat

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "ratio": {"type": "number"},
        "hourly": {"type": "boolean"},
        "note": {"type": ["string", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object"},
    },
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "forecast", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


def events_of(
    found: ReplyFormat,
    pieces: Iterable[str],
    tools: Sequence[dict[str, Any]] = TOOLS,
    *,
    thinking: bool = False,
) -> list[Event]:
    """All events of a reply that comes in `pieces`."""
    parser = found.parser(tools, thinking)
    events = [event for piece in pieces for event in parser.push(piece)]
    return events + parser.close()


def said(events: Iterable[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and the name and arguments of every call."""
    reply = collect(events)
    return reply.content, reply.reasoning, [(call.name, call.arguments) for call in reply.calls]


def streamed(events: Iterable[Event]) -> list[tuple[str, int, str]]:
    """Events with pieces of one kind joined and ids left out: what may not depend on cuts."""
    joined: list[tuple[str, int, str]] = []
    for event in events:
        index = getattr(event, "index", -1)
        text = event.name if isinstance(event, CallBegin) else event.text
        kind = type(event).__name__
        whole = isinstance(event, CallBegin) or not joined or joined[-1][:2] != (kind, index)
        if whole:
            joined.append((kind, index, text))
        else:
            joined[-1] = (kind, index, joined[-1][2] + text)
    return joined


def argument_pieces(events: Iterable[Event]) -> list[str]:
    """The pieces of arguments, in order."""
    return [event.text for event in events if isinstance(event, CallArguments)]
