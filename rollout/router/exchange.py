"""One request of a client, from the choice of a worker to the end of its reply.

A reply that is journaled comes in frames (`rollout.http.journal.frames`). Until its end the records
are kept; when the worker is lost, another one gets them and goes on. A client of a stream then gets
what it has not got yet, any other client the whole reply: neither can tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.errors import SlipstreamError
from rollout.http.edge.errors import error_body
from rollout.http.edge.sse import NAMED, frame
from rollout.http.journal import frames
from rollout.http.journal.frames import BadFrames, Head, Resumed, Ticket
from rollout.router.choice.ask import Ask, Policy
from rollout.router.config import RouterConfig
from rollout.router.errors import NoWorker, WorkerLost
from rollout.router.metrics import RouterMetrics
from rollout.router.wire.client_connection import ClientConnection
from rollout.router.wire.framed_reply import FramedReply
from rollout.router.wire.messages import ClientRequest, Header, Reply, error_reply, request_head
from rollout.router.wire.worker_connection import WorkerConnection
from rollout.router.workers.breaker import RetryBudget
from rollout.router.workers.call import refusal
from rollout.router.workers.joining import Joining
from rollout.router.workers.registry import Fleet
from rollout.router.workers.worker import Worker

_MOST_LOSSES = 3
"""Workers that one request may lose: one that ends whoever serves it must not end a fleet."""
_NAMED_PATHS = ("/v1/messages", "/v1/responses")
_SAFE = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})

OnReply = Callable[[Worker, Reply], None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every exchange uses. parked: those that wait for a worker."""

    config: RouterConfig
    fleet: Fleet
    policy: Policy
    joining: Joining
    metrics: RouterMetrics
    budget: RetryBudget = field(default_factory=RetryBudget)
    parked: set[Exchange] = field(default_factory=set)


@dataclass(slots=True)
class _Journal:
    """What is known of a reply that is on its way. records: what was sampled. num_pieces: of the
    body, that the client has. version: of the weights that sampled last."""

    ticket: Ticket
    records: list[bytes] = field(default_factory=list)
    num_pieces: int = 0
    version: str = ""


@dataclass(slots=True)
class _Incoming:
    """What one try has brought so far."""

    head: Head | None = None
    parts: list[bytes] = field(default_factory=list)
    streams: bool = False
    reader: FramedReply | None = None
    began: bool = False


class Exchange:
    """Hears the worker's connection and the client's (`Listener`, `Handler`).

    ask: what the choice may depend on. ticket: with it the reply is journaled. only: the one worker
    that can answer; another would not know what the request speaks of. repeatable: doing it twice
    changes nothing. on_reply: called with who answered, and the reply; a stream's without its body.
    """

    def __init__(
        self,
        parts: Parts,
        request: ClientRequest,
        client: ClientConnection,
        *,
        ask: Ask,
        ticket: Ticket | None = None,
        only: Worker | None = None,
        repeatable: bool = False,
        on_reply: OnReply | None = None,
    ) -> None:
        self._parts = parts
        self._request = request
        self._client = client
        self._ask = ask
        self._only = only
        self._on_reply = on_reply
        self._repeatable = repeatable or request.method in _SAFE
        self._journal = None if ticket is None else _Journal(ticket)
        self._tried: set[Worker] = set()
        self._worker: Worker | None = None
        self._connection: WorkerConnection | None = None
        self._in = _Incoming()
        self._num_losses = 0
        self._sent_head = False
        self._over = False
        self._slow = False
        self._tries = False
        self._why = ""
        self._patience: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Choose a worker and ask it."""
        self._parts.budget.earn()
        self._next()

    def wake(self) -> None:
        """A worker may be asked that could not before."""
        self._unpark()
        self._next()

    # Of the client's connection.

    def client_left(self) -> None:
        self._over = True
        self._unpark()
        if self._connection is not None:
            self._connection.abort()
        self._release()

    def client_slow(self, *, slow: bool) -> None:
        self._slow = slow
        if self._connection is not None:
            self._connection.pause(paused=slow)

    # Of the worker's connection.

    def reply_begins(self, status: int, headers: list[Header]) -> None:
        self._in.began = True
        found = dict(headers)
        kind = found.get(b"content-type", b"")
        if kind == frames.CONTENT_TYPE and self._journal is not None:
            self._in.reader = FramedReply(self._journal.ticket.name)
            return
        names = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        self._take_head(Head(status, names))

    def reply_piece(self, data: bytes) -> None:
        if self._in.reader is None:
            self._take_piece(data)
            return
        try:
            for kind, value in self._in.reader.feed(data):
                self._take_frame(kind, value)
        except BadFrames as error:
            connection = self._connection
            if connection is not None:
                connection.abort()
            self._lost(f"sent bytes outside the protocol: {error}")

    def reply_ends(self) -> None:
        if self._in.reader is not None and not self._in.reader.ended:
            self._lost("cut its reply")
            return
        worker = self._worker
        assert worker is not None and self._in.head is not None, "a reply has a head"
        worker.breaker.succeeded()
        worker.num_done += 1
        self._release()
        status = self._in.head.status
        if status == 503 and not self._in.streams and self._refused(worker):
            return
        self._finish(worker)

    def reply_lost(self, why: str) -> None:
        self._lost(why)

    def _next(self) -> None:
        """Ask the next worker, or say that there is none."""
        worker = self._choose()
        if worker is None:
            self._without_worker()
            return
        self._worker, self._in = worker, _Incoming()
        worker.num_open += self._ask.num_samples
        worker.num_bytes += len(self._ask.prompt)
        if worker.breaker.half_open:
            self._tries = True
            worker.breaker.begin_try()
            self._parts.fleet.touch()
        worker.take(self._connected, fresh=not self._repeatable)

    def _able(self) -> Sequence[Worker]:
        """Who may be asked and has not been."""
        able: Sequence[Worker] = self._parts.fleet.rotation()
        if (only := self._only) is not None:
            able = [only] if only.in_rotation or (only.draining and only.joined) else []
        return [worker for worker in able if worker not in self._tried] if self._tried else able

    def _choose(self) -> Worker | None:
        parts, journal, able = self._parts, self._journal, self._able()
        if self._only is not None or not able:
            return able[0] if able else None
        if journal is not None and journal.records and journal.version:
            # With the weights that sampled its last token it goes on as if nothing had been.
            able = [worker for worker in able if worker.version == journal.version] or able
        choice = parts.policy.choose(self._ask, able)
        parts.metrics.chose(choice.reason, num_hit=choice.num_hit, size=len(self._ask.prompt))
        return able[choice.place]

    def _connected(self, connection: WorkerConnection | None, why: str) -> None:
        worker = self._worker
        if connection is None:
            assert worker is not None or self._over
            if worker is not None:
                self._failed(worker)
                self._why = why
                self._next()
            return
        if self._over or worker is None:
            connection.abort()
            return
        self._connection = connection
        connection.send(self._message(worker), self)
        connection.pause(paused=self._slow)

    def _message(self, worker: Worker) -> bytes:
        request, journal = self._request, self._journal
        target, body = request.target, request.body
        method = "GET" if request.method == "HEAD" else request.method
        dropped, added = {frames.HEADER}, []
        if self._parts.config.worker_api_key:
            dropped |= {b"authorization", b"x-api-key"}
            key = b"Bearer " + self._parts.config.worker_api_key.encode()
            added.append((b"authorization", key))
        if journal is not None:
            if journal.records:
                dropped.add(b"content-type")
                target, method = frames.RESUME_PATH.encode(), "POST"
                resumed = Resumed(request.path, journal.ticket, journal.num_pieces)
                body = frames.resume_body(resumed, journal.records, body)
                self._parts.metrics.resumed()
            else:
                added.append((frames.HEADER, msgspec.json.encode(journal.ticket)))
        headers = [pair for pair in request.headers if pair[0] not in dropped] + added
        path = worker.prefix + target
        return request_head(method, path, worker.host, headers, len(body)) + body

    def _take_frame(self, kind: bytes, value: bytes | Head) -> None:
        journal = self._journal
        assert journal is not None, "only what is journaled comes in frames"
        if isinstance(value, Head):
            self._take_head(value)
        elif kind == frames.RECORD:
            journal.records.append(value)
            self._parts.metrics.noted(len(value))
        elif kind == frames.PIECE:
            self._take_piece(value)
            journal.num_pieces += self._in.streams
        elif kind == frames.VERSION:
            journal.version = value.decode(errors="replace")

    def _take_head(self, head: Head) -> None:
        self._in.head = head
        kinds = [value for name, value in head.headers if name == "content-type"]
        self._in.streams = head.status == 200 and any(
            kind.startswith("text/event-stream") for kind in kinds
        )
        if self._in.streams and not self._sent_head:
            self._sent_head = True
            self._client.begin_stream(head.status, head.pairs())

    def _take_piece(self, data: bytes) -> None:
        if self._in.streams:
            self._client.send_piece(data)
        else:
            self._in.parts.append(data)

    def _finish(self, worker: Worker) -> None:
        head = self._in.head
        assert head is not None
        self._over = True
        self._parts.metrics.answered(head.status)
        reply = Reply(head.status, head.pairs(), b"".join(self._in.parts))
        if self._on_reply is not None:
            self._on_reply(worker, reply)
        if self._in.streams:
            self._client.end_stream()
        elif self._sent_head:
            # It began as a stream, and nobody could go on: the error is its last event.
            self._end_by(refusal(worker, reply))
        else:
            self._client.reply(reply)

    def _refused(self, worker: Worker) -> bool:
        """Whether another worker is asked in place of one that takes nothing now."""
        self._tried.add(worker)
        self._parts.joining.look(worker)
        others = self._only is None and bool(self._able())
        if not (others and self._repeatable and self._parts.budget.spend()):
            return False
        self._parts.metrics.retried()
        self._next()
        return True

    def _lost(self, why: str) -> None:
        worker, connection = self._worker, self._connection
        self._connection = None
        if worker is None or self._over:
            return
        self._why = f"{worker.url} {why}"
        stale = connection is not None and connection.used and not self._in.began
        if stale and self._num_losses == 0 and self._repeatable:
            # It had closed a connection that nobody used: nothing is known of its health.
            self._release()
            self._num_losses += 1
            self._next()
            return
        self._num_losses += 1
        self._parts.metrics.lost()
        self._failed(worker)
        if self._num_losses > _MOST_LOSSES:
            self._fail(
                WorkerLost(
                    f"{self._why}; it is the last of {_MOST_LOSSES} that were lost by this request",
                    field="worker",
                )
            )
        elif self._journal is None and (self._sent_head or not self._repeatable):
            self._fail(WorkerLost(f"{self._why}, and what it did is not known", field="worker"))
        else:
            self._next()

    def _failed(self, worker: Worker) -> None:
        """The worker could not be reached, or was lost."""
        worker.breaker.failed()
        self._parts.joining.doubt(worker)
        self._tried.add(worker)
        self._release()

    def _release(self) -> None:
        worker, self._worker, self._connection = self._worker, None, None
        if worker is not None:
            worker.num_open -= self._ask.num_samples
            worker.num_bytes -= len(self._ask.prompt)
            if self._tries:
                self._tries = False
                worker.breaker.undecided()

    def _without_worker(self) -> None:
        parts = self._parts
        if self._only is not None:
            why = self._why or f"{self._only.url} {self._only.state}"
            self._fail(WorkerLost(f"{why}; what the request speaks of was there", field="worker"))
        elif self._num_losses:
            # Whoever was lost may come back, and is as good as another then.
            self._tried.clear()
            parts.parked.add(self)
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(parts.config.patience_s, self._give_up)
            parts.metrics.parked()
        else:
            self._fail(self._no_worker())

    def _give_up(self) -> None:
        self._parts.parked.discard(self)
        self._fail(self._no_worker())

    def _unpark(self) -> None:
        self._parts.parked.discard(self)
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _no_worker(self) -> SlipstreamError:
        told = [f"{worker.url} {worker.state}" for worker in list(self._parts.fleet)[:8]]
        why = "; ".join(told) or "none is registered: start one with --router, or POST /workers"
        lost = f" ({self._why})" if self._why else ""
        return NoWorker(f"no worker may be asked: {why}{lost}", field="workers")

    def _fail(self, error: SlipstreamError) -> None:
        """Answer by an error; in a stream that has begun as its last event."""
        self._over = True
        self._parts.metrics.answered(error.status)
        if self._sent_head:
            self._end_by(error)
        else:
            self._client.reply(error_reply(error, self._request.path))

    def _end_by(self, error: SlipstreamError) -> None:
        named = self._request.path.startswith(_NAMED_PATHS)
        event = NAMED.frame(NAMED.error(error)) if named else frame(error_body(error))
        self._client.send_piece(event)
        self._client.end_stream()
