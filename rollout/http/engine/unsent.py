"""Requests that the engine has not got: held back, or parts of a large call yet to be sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from engine.protocol import Abort, Request
from rollout.requests.sample_ids import starts_with


class Unsent:
    """Requests of all calls, in the order in which they came; its length counts them."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, requests: Sequence[Request]) -> None:
        """Append requests, whose ids nobody else uses."""
        self._requests.update((request.rid, request) for request in requests)

    def first(self, most: int) -> list[Request]:
        """The first ones, `most` at most; they stay until they are forgotten."""
        return list(islice(self._requests.values(), most))

    def take_named(self, abort: Abort) -> list[Request]:
        """Remove and return those that `abort` names by their own ids (`Mailboxes.resolved`)."""
        if abort.all:
            rids = list(self._requests)
        else:
            rids = [abort.rid, *abort.rids]
            if abort.rid_prefix:
                rids += [rid for rid in self._requests if starts_with(rid, abort.rid_prefix)]
        found = (self._requests.pop(rid, None) for rid in rids)
        return [request for request in found if request is not None]

    def forget(self, rids: Iterable[str]) -> set[str]:
        """Remove those of these ids that are here; which they were."""
        return {rid for rid in rids if self._requests.pop(rid, None) is not None}

    def clear(self) -> list[str]:
        """Remove all; their ids."""
        rids = list(self._requests)
        self._requests.clear()
        return rids
