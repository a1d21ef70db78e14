"""Requests that an HTTP call has made and the engine has not got: held back, or part of a large
call whose other parts it is still taking in."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from engine.protocol import Abort, Request
from rollout.sample_ids import of_sample, starts_with


class Unsent:
    """Requests by the call they are of, in the order of the calls. Used by `AsyncEngine` alone.

    holding: whether calls are held back. num_held: sequences of those that are.
    """

    def __init__(self) -> None:
        self.holding = False
        self._held: list[list[Request]] = []
        self._parts: list[list[Request]] = []

    @property
    def num_held(self) -> int:
        """Sequences that are held back."""
        return sum(len(requests) for requests in self._held)

    def hold(self) -> None:
        """Hold back what comes from now on. Idempotent."""
        self.holding = True

    def keep(self, requests: Sequence[Request]) -> None:
        """Hold back the requests of one call."""
        self._held.append(list(requests))

    def release(self) -> list[Request]:
        """Hold nothing back any more; returns what was held, to be sent. Idempotent."""
        held = [request for requests in self._held for request in requests]
        self.holding, self._held = False, []
        return held

    def clear(self) -> None:
        """Forget what is held, and hold back what comes, if that was so."""
        self._held = []

    def begin(self, requests: Sequence[Request]) -> list[Request]:
        """What a large call has yet to send; the caller takes from it, and calls `end`."""
        unsent = list(requests)
        self._parts.append(unsent)
        return unsent

    def end(self, unsent: list[Request]) -> None:
        """Forget what `begin` returned."""
        self._parts = [other for other in self._parts if other is not unsent]

    def discard(self, rids: AbstractSet[str]) -> set[str]:
        """Forget those of `rids` that are held; returns which were."""
        found = {request.rid for requests in self._held for request in requests} & rids
        self._held = [[r for r in requests if r.rid not in found] for requests in self._held]
        return found

    def take(self, abort: Abort) -> list[Request]:
        """Take out the requests that `abort` names."""
        named: list[Request] = []
        for requests in (*self._held, *self._parts):
            named += [request for request in requests if _names(abort, request)]
            requests[:] = [request for request in requests if not _names(abort, request)]
        return named


def _names(abort: Abort, request: Request) -> bool:
    prefix = abort.rid_prefix
    if abort.all or request.rid == abort.rid or request.rid in abort.rids:
        return True
    if abort.rid and request.rid == of_sample(abort.rid):
        return True
    return bool(prefix and starts_with(request.rid, prefix))
