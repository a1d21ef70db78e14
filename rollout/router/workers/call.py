"""One call of the router's own to a worker, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec

from engine.errors import SlipstreamError, of_body
from rollout.router.errors import WorkerLies, WorkerLost
from rollout.router.wire.messages import Header, Reply, request_head
from rollout.router.wire.worker_connection import WorkerConnection
from rollout.router.workers.worker import Worker


class _Waiting:
    """The listener of one call."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._reply = Reply(0)
        self._parts: list[bytes] = []

    def reply_begins(self, status: int, headers: list[Header]) -> None:
        self._reply = Reply(status, headers)

    def reply_piece(self, data: bytes) -> None:
        self._parts.append(data)

    def reply_ends(self) -> None:
        self._reply.body = b"".join(self._parts)
        if not self.done.done():
            self.done.set_result(self._reply)

    def reply_lost(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(WorkerLost(why, field="worker"))


async def call(
    worker: Worker,
    method: str,
    target: str,
    *,
    body: bytes = b"",
    headers: Iterable[Header] = (),
    key: str = "",
    timeout_s: float,
) -> Reply:
    """The reply of a worker to one request, on a connection of its own. key: sent as Bearer.

    Raises WorkerLost if none comes in time.
    """
    connection = await _connection(worker)
    waiting = _Waiting()
    pairs = [*headers, (b"authorization", b"Bearer " + key.encode())] if key else list(headers)
    if body and not any(name == b"content-type" for name, _ in pairs):
        pairs.append((b"content-type", b"application/json"))
    pairs.append((b"connection", b"close"))
    path = worker.prefix + target.encode()
    head = request_head(method, path, worker.host, pairs, len(body))
    try:
        async with asyncio.timeout(timeout_s):
            connection.send(head + body, waiting)
            return await waiting.done
    except TimeoutError as error:
        raise WorkerLost(
            f"{worker.url} gave no answer to {target} within {timeout_s:g} s", field="worker"
        ) from error
    except WorkerLost as error:
        raise WorkerLost(f"{worker.url}: {error.message}", field="worker") from error
    finally:
        connection.abort()


async def call_json(worker: Worker, method: str, target: str, **options: Any) -> dict[str, Any]:
    """`call`, where an object is expected. Raises the typed error of a refusal too, and WorkerLies
    for what is no object."""
    reply = await call(worker, method, target, **options)
    if reply.status != 200:
        raise refusal(worker, reply)
    try:
        found: dict[str, Any] = msgspec.json.decode(reply.body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise WorkerLies(
            f"{worker.url} answered {target} by what is no JSON object", field="worker"
        ) from error
    return found


def refusal(worker: Worker, reply: Reply) -> SlipstreamError:
    """The error that a reply tells of, with the worker's name."""
    told = of_body(reply.body)
    if told is None:
        text = reply.body[:300].decode(errors="replace")
        return SlipstreamError(f"{worker.url} answered {reply.status}: {text}", field="worker")
    return type(told)(f"{worker.url}: {told.message}", field=told.field)


async def _connection(worker: Worker) -> WorkerConnection:
    done: asyncio.Future[WorkerConnection] = asyncio.get_running_loop().create_future()

    def taken(connection: WorkerConnection | None, why: str) -> None:
        if done.done():
            if connection is not None:
                connection.abort()
        elif connection is None:
            done.set_exception(WorkerLost(why, field="worker"))
        else:
            done.set_result(connection)

    worker.take(taken, fresh=True)
    return await done
