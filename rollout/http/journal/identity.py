"""What the ids and times in a reply are made of: drawn anew, or given so that they come again."""

from __future__ import annotations

import time
import uuid
from itertools import count
from typing import Protocol

from rollout.http.journal.frames import Ticket
from rollout.requests.sample_ids import fresh_id


class Identity(Protocol):
    """Where a call gets its ids and its time."""

    def draw_id(self) -> str:
        """32 hexadecimal digits that no other id has."""
        ...

    def now(self) -> int:
        """Seconds since 1970."""
        ...


class Drawn:
    """New ones each time."""

    def draw_id(self) -> str:
        return fresh_id()

    def now(self) -> int:
        return int(time.time())


class Given:
    """Those of a ticket: the same, in the same order, wherever the call runs."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._numbers = count()

    def draw_id(self) -> str:
        name, number = self._ticket.name, next(self._numbers)
        # The first is the call's own, as whoever gave the ticket expects it.
        return uuid.uuid5(_SPACE, f"{name}/{number}").hex if number else name

    def now(self) -> int:
        return self._ticket.created


_SPACE = uuid.UUID(int=0)
