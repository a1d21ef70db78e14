"""Requests that the engine has not got: held back, or parts of a large call yet to be sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice

from engine.errors import EngineDead
from engine.protocol import Abort, Request
from rollout.replica.ipc import encode_frame
from rollout.requests.sample_ids import starts_with

PART = 512
"""Most sequences that the engine gets at a time."""


class Unsent:
    """Requests of all calls, in the order in which they came; its length counts them."""

    def __init__(self, requests: Sequence[Request] = ()) -> None:
        self._requests = {request.rid: request for request in requests}

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


class Outbox:
    """How the requests of one engine leave: at once, in parts, or once nothing holds them back.

    post: sends a part, or raises. part_taken: returns once the engine has taken in what it was
    sent, so that its steps go on between two parts. The outbox's length counts what is held.
    changed: called with `holds` whenever that changes.
    """

    def __init__(
        self, post: Callable[[Sequence[Request]], None], part_taken: Callable[[], Awaitable[None]]
    ) -> None:
        self._post = post
        self._part_taken = part_taken
        self._holding = False
        self._held = Unsent()
        self._sending: asyncio.Task[None] | None = None
        self._parted: list[Unsent] = []
        self.changed: Callable[[bool], None] = lambda _: None

    def __len__(self) -> int:
        return len(self._held)

    @property
    def holds(self) -> bool:
        """Whether requests that come now have to wait here."""
        return self._holding or bool(self._held)

    def send(self, requests: Sequence[Request]) -> None:
        """Send requests, or hold them behind those that are held. Raises what `post` does;
        nothing is sent or held then."""
        if self.holds:
            # Sent later, with those of others: what cannot be encoded must not get there.
            encode_frame(requests)
            self._held.add(requests)
        else:
            self._post(requests)

    async def send_parts(self, unsent: Unsent, check: Callable[[], None]) -> None:
        """Send `unsent` in parts until it is empty. check: raises, before a part, if no more
        may leave; what has not left then is still in `unsent`."""
        self._parted.append(unsent)
        try:
            while unsent:
                check()
                self._send_first(unsent)
                if unsent:
                    await self._part_taken()
        finally:
            self._parted = [other for other in self._parted if other is not unsent]

    def hold(self) -> None:
        """Keep requests that come from now on here, until `release`. Idempotent."""
        self._holding = True
        self.changed(True)

    def release(self) -> None:
        """Hold nothing back any more; send what was held, in the order in which it came: in
        parts, so that steps go on in between. Idempotent."""
        self._holding = False
        if self._sending is None and self._held:
            with contextlib.suppress(EngineDead):
                self._send_first(self._held)
            if self._held:
                self._sending = asyncio.create_task(self._send_held())
        self.changed(self.holds)

    def take_named(self, abort: Abort) -> list[Request]:
        """Remove and return those that `abort` names of the requests that are here."""
        boxes = (self._held, *self._parted)
        return [request for requests in boxes for request in requests.take_named(abort)]

    def forget(self, rids: Iterable[str]) -> set[str]:
        """Remove those of these ids that are held; which they were."""
        return self._held.forget(rids)

    def clear(self) -> None:
        """Remove all that is held."""
        self._held.clear()
        self.changed(self.holds)

    async def _send_held(self) -> None:
        """The parts after the first, unless `hold` is called again meanwhile."""
        try:
            with contextlib.suppress(EngineDead):
                await self._part_taken()
                while self._held and not self._holding:
                    self._send_first(self._held)
                    await self._part_taken()
        finally:
            self._sending = None
            self.changed(self.holds)

    def _send_first(self, requests: Unsent) -> None:
        part = requests.first(PART)
        self._post(part)
        requests.forget(request.rid for request in part)
