"""Which worker has a session, a rollout or a stored response."""

from __future__ import annotations

from collections import OrderedDict
from urllib.parse import unquote

import msgspec

from engine.errors import SlipstreamError
from rollout.router.wire.messages import ClientRequest, Reply
from rollout.router.workers.registry import Fleet
from rollout.router.workers.worker import Worker

_MOST = 1 << 20
_OPENING = frozenset({"/sessions", "/open_session", "/rollouts"})


class Places:
    """Workers by the names of what they hold; at most `most`, the oldest of which goes first."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._urls: OrderedDict[str, str] = OrderedDict()

    def worker_of(self, name: str, fleet: Fleet) -> Worker | None:
        """Who has it; None for what this router has not seen, or whose worker was removed."""
        url = self._urls.get(name)
        if url is None:
            return None
        try:
            return fleet.find(url)
        except SlipstreamError:
            return None

    def note(self, name: str, worker: Worker) -> None:
        """`worker` has it."""
        self._urls[name] = worker.url
        self._urls.move_to_end(name)
        while len(self._urls) > self._most:
            self._urls.popitem(last=False)

    def learn(self, request: ClientRequest, worker: Worker, reply: Reply) -> None:
        """Note what a reply says was opened."""
        if request.path not in _OPENING or reply.status != 200:
            return
        name = opened(reply.body)
        if name:
            self.note(name, worker)


def named_in(request: ClientRequest) -> str:
    """The name of what a call speaks of; "" where it opens something."""
    if request.path == "/close_session":
        return opened(request.body)
    parts = request.path.split("/")
    at = 3 if request.path.startswith("/v1/") else 2
    return unquote(parts[at]) if len(parts) > at else ""


class _Opened(msgspec.Struct):
    id: str = ""
    session_id: str = ""


def opened(body: bytes) -> str:
    """The name in a JSON object, or a JSON text that is the name; "" in anything else."""
    try:
        found = msgspec.json.decode(body, type=_Opened | str)
    except msgspec.DecodeError:
        return ""
    return found if isinstance(found, str) else found.id or found.session_id
