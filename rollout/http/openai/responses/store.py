"""Responses that are kept, in memory and within bounds, so that others can go on from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.errors import InvalidRequest

MAX_RESPONSES = 4096
"""Most responses that a server keeps."""

MAX_BYTES = 256 << 20
"""Most bytes of JSON that they have together, each with the whole conversation before it."""


class UnknownResponse(InvalidRequest):
    """A response that is not, or no longer, kept here."""

    status = 404
    code = "response_not_found"


class UnknownPrevious(InvalidRequest):
    """`previous_response_id` names none that is kept here."""

    code = "previous_response_not_found"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One response. body: the JSON of its reply. input: its own input items. conversation: all
    items up to its end, its output included. num_bytes: what it takes."""

    body: bytes
    input: Sequence[dict[str, Any]]
    conversation: Sequence[dict[str, Any]]
    num_bytes: int


class ResponseStore:
    """The oldest leave first."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(
        self,
        name: str,
        response: dict[str, Any],
        own_input: Sequence[dict[str, Any]],
        before: Sequence[dict[str, Any]],
    ) -> None:
        """Keep a response that is over. before: the items that its input came behind. One that is
        larger than all the room is not kept."""
        body = msgspec.json.encode(response)
        conversation = [*before, *own_input, *response["output"]]
        size = len(body) + len(msgspec.json.encode(conversation))
        self.discard(name)
        if size > self._max_bytes:
            return
        self._kept[name] = Stored(
            body=body, input=own_input, conversation=conversation, num_bytes=size
        )
        self._num_bytes += size
        while len(self._kept) > self._max_responses or self._num_bytes > self._max_bytes:
            self.discard(next(iter(self._kept)))

    def get(self, name: str) -> Stored:
        """A response. Raises UnknownResponse."""
        found = self._kept.get(name)
        if found is None:
            raise UnknownResponse(
                f"there is no response {name[:200]!r} here: it was not stored, was deleted, or "
                "left for newer ones",
                field="response_id",
            )
        return found

    def conversation(self, name: str | None) -> Sequence[dict[str, Any]]:
        """The items that a response goes on from. Raises UnknownPrevious."""
        if name is None:
            return []
        try:
            return self.get(name).conversation
        except UnknownResponse as error:
            raise UnknownPrevious(error.message, field="previous_response_id") from error

    def discard(self, name: str) -> bool:
        """Forget a response; whether there was one."""
        found = self._kept.pop(name, None)
        if found is not None:
            self._num_bytes -= found.num_bytes
        return found is not None
