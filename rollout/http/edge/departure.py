"""Who is to be told that the client of a connection has left.

A connection of `connection.PatientProtocol` has one in the scope of each request. Where a server is
not ours, `receive` of the ASGI protocol says so, which takes a task that waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Scope

_KEY = "slipstream.departure"


class Departure:
    """The end of one connection, and calls that wait for it. body_arrived: whether the last byte of
    the request that began last has come, so that nobody has to wait for its body."""

    def __init__(self) -> None:
        self.body_arrived = False
        self._calls: set[Callable[[], None]] = set()
        self._left = False

    def offer(self, scope: Scope) -> None:
        """Let whoever handles a request of the connection find it."""
        scope.setdefault("extensions", {})[_KEY] = self

    def tell(self, call: Callable[[], None]) -> None:
        """Have `call` called when the client leaves; now, if it has."""
        if self._left:
            call()
        else:
            self._calls.add(call)

    def forget(self, call: Callable[[], None]) -> None:
        """Do not tell it any more."""
        self._calls.discard(call)

    def happens(self) -> None:
        """The client has left."""
        self._left = True
        calls, self._calls = self._calls, set()
        for call in calls:
            call()


def departure_of(scope: Scope) -> Departure | None:
    """The departure that the scope of a request has, if its server gives one."""
    found: Departure | None = (scope.get("extensions") or {}).get(_KEY)
    return found
