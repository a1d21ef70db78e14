"""The fleet: which workers there are, who joins and who leaves, and which weights they serve."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from engine.errors import InvalidRequest
from engine.protocol.urls import url_fault
from rollout.router.errors import UnknownWorker
from rollout.router.workers.worker import Worker

_MOST_WORKERS = 10_000
_FRESH_S = 0.05


class Fleet:
    """Workers by URL, in the order in which they came.

    version: label of the weights that the fleet serves, once an update went through this router;
    None before, when every worker is taken as it is. model: name of what its first worker serves,
    until none is left.
    """

    def __init__(self, *, connect_s: float) -> None:
        self._connect_s = connect_s
        self._workers: dict[str, Worker] = {}
        self._rotation: tuple[Worker, ...] = ()
        self._looked_at = float("-inf")
        self._changed: list[Callable[[], None]] = []
        self.version: str | None = None
        self.model = ""

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def on_change(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever a worker may be asked that could not before."""
        self._changed.append(call)

    def touch(self) -> None:
        """A worker may be asked that could not, or the other way round."""
        self._looked_at = float("-inf")

    def changed(self) -> None:
        """Tell them."""
        self.touch()
        for call in self._changed:
            call()

    def add(self, url: str) -> tuple[Worker, bool]:
        """(the worker at `url`, whether it is new). One that registers again has been started
        again, or registers twice: it is looked at anew, and keeps its place.

        Raises InvalidRequest (`url`).
        """
        if fault := url_fault(url):
            raise InvalidRequest(fault, field="url")
        url = _plain(url)
        known = self._workers.get(url)
        if known is not None:
            known.draining = False
            self.touch()
            return known, False
        if len(self._workers) >= _MOST_WORKERS:
            raise InvalidRequest(f"{_MOST_WORKERS} workers are registered already", field="url")
        worker = Worker(url, uuid.uuid4().hex, connect_s=self._connect_s)
        self._workers[url] = worker
        return worker, True

    def find(self, name: str) -> Worker:
        """The worker of that id or URL. Raises UnknownWorker."""
        found = None if url_fault(name) else self._workers.get(_plain(name))
        for worker in self._workers.values():
            if worker.id == name:
                found = worker
        if found is None:
            raise UnknownWorker(f"no worker {name[:200]!r} is registered", field="worker")
        return found

    def drop(self, worker: Worker) -> None:
        """Forget a worker."""
        if self._workers.get(worker.url) is worker:
            del self._workers[worker.url]
            # Who comes to an empty fleet is its first.
            self.model = self.model if self._workers else ""
            self.touch()
        worker.close()

    def rotation(self) -> tuple[Worker, ...]:
        """Those that may be asked; the same object as long as nothing was touched and no breaker's
        time can have run out."""
        now = time.monotonic()
        if now - self._looked_at > _FRESH_S:
            found = tuple(worker for worker in self._workers.values() if worker.in_rotation)
            if found != self._rotation:
                self._rotation = found
            self._looked_at = now
        return self._rotation


def _plain(url: str) -> str:
    """One way of writing it; a path means what it says, upper case too."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"
