"""One worker: where it is, what it is, how it does, and the connections to it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit

from rollout.router.wire.worker_connection import WorkerConnection
from rollout.router.workers.breaker import Breaker
from rollout.router.workers.facts import Facts

_IDLE_S = 60.0
_MOST_IDLE = 1024

Taken = Callable[[WorkerConnection | None, str], None]


class Worker:
    """A server behind the router, named by its URL.

    id: by which the API calls it. joined: what it is was looked up. alike: it serves the fleet's
    model. held: why it may not be asked, until its weights are published again; "". why: what came
    of it when it was last asked what it is; "". draining: it gets nothing new. facts: what its
    `/server_info` says. version: of its weights, as it calls it. epoch: counts what its prefix
    cache did not survive. num_open: sequences on it. num_bytes: of their prompts. num_controls:
    control calls on it; while there are any, silence means nothing.
    """

    def __init__(self, url: str, worker_id: str, *, connect_s: float) -> None:
        self.url = url
        self.id = worker_id
        self.joined = False
        self.alike = True
        self.held = ""
        self.why = ""
        self.draining = False
        self.facts = Facts()
        self.version = ""
        self.epoch = 0
        self.num_open = 0
        self.num_bytes = 0
        self.num_controls = 0
        self.num_done = 0
        self.heard_at = time.monotonic()
        self.breaker = Breaker(time.monotonic)
        parts = urlsplit(url)
        self.host = parts.netloc.encode()
        self.prefix = parts.path.rstrip("/").encode()
        self._address = (
            parts.hostname or "",
            parts.port or (443 if parts.scheme == "https" else 80),
        )
        self._tls = parts.scheme == "https"
        self._connect_s = connect_s
        self._idle: deque[tuple[WorkerConnection, float]] = deque()
        self._all: set[WorkerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_rotation(self) -> bool:
        """Whether it may be given requests."""
        return self.joined and not (self.held or self.draining or self.breaker.is_open)

    @property
    def takes_weights(self) -> bool:
        """Whether an update of the fleet is for it too, in rotation or not."""
        return self.joined and self.alike and not self.draining

    @property
    def state(self) -> str:
        """What it is doing, in a word or a reason."""
        if self.draining:
            return f"drains, {self.num_open} requests left"
        if not self.joined:
            return f"has not answered yet{': ' if self.why else ''}{self.why[:500]}"
        if self.held:
            return self.held
        return "does not answer" if self.breaker.is_open else "ready"

    def take(self, taken: Taken, *, fresh: bool = False) -> None:
        """Have `taken` called with a connection, or with None and why there is none; at once, if
        one is idle. fresh: a new one."""
        while self._idle and not fresh:
            connection, since = self._idle.pop()
            if time.monotonic() - since < _IDLE_S and connection in self._all:
                taken(connection, "")
                return
            connection.abort()
        task = asyncio.get_running_loop().create_task(self._connect(taken))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, taken: Taken) -> None:
        loop = asyncio.get_running_loop()
        made = WorkerConnection(self)
        try:
            async with asyncio.timeout(self._connect_s):
                await loop.create_connection(
                    lambda: made, *self._address, ssl=True if self._tls else None
                )
        except (OSError, TimeoutError, UnicodeError) as error:
            why = str(error) or f"no connection within {self._connect_s:g} s"
            taken(None, f"{self.url} cannot be reached: {why}")
            return
        self._all.add(made)
        taken(made, "")

    def rested(self, connection: WorkerConnection) -> None:
        if len(self._idle) < _MOST_IDLE:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.abort()

    def gone(self, connection: WorkerConnection) -> None:
        self._all.discard(connection)

    def alive(self) -> None:
        self.heard_at = time.monotonic()

    def cut(self) -> None:
        """It is taken for dead: end every connection, so that what is open is lost now."""
        for connection in list(self._all):
            connection.cut()

    def close(self) -> None:
        """End what is idle."""
        while self._idle:
            self._idle.pop()[0].abort()
