"""Control calls: to all workers at once, and one answer that says what became of each."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.errors import SlipstreamError
from rollout.http.edge.errors import error_body
from rollout.router.config import RouterConfig
from rollout.router.errors import FanOutFailed, NoWorker
from rollout.router.metrics import RouterMetrics
from rollout.router.wire.messages import ClientRequest, Reply, json_reply
from rollout.router.workers.call import call
from rollout.router.workers.joining import Joining
from rollout.router.workers.registry import Fleet
from rollout.router.workers.worker import Worker

CONTROL_S = 1800.0
"""Deadline of a control call; workers end each by their own before."""


@dataclass(frozen=True)
class Outcome:
    """What one worker answered, or why it did not."""

    worker: Worker
    reply: Reply | None = None
    error: SlipstreamError | None = None

    @property
    def good(self) -> bool:
        """Whether it took the call."""
        return self.reply is not None and self.reply.status == 200

    def told(self) -> dict[str, Any]:
        """The outcome as an object."""
        if self.reply is None:
            assert self.error is not None
            return {"success": False, "status": None, **error_body(self.error)}
        try:
            body = msgspec.json.decode(self.reply.body) if self.reply.body else None
        except msgspec.DecodeError:
            body = self.reply.body.decode(errors="replace")
        return {"success": self.good, "status": self.reply.status, "reply": body}


class FanOut:
    """Makes control calls of all workers that are members of the fleet, in rotation or not."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, joining: Joining, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._joining = joining
        self._metrics = metrics
        self._order = asyncio.Lock()

    async def run(self, request: ClientRequest) -> Reply:
        """The answer to one control call. Raises NoWorker."""
        workers = [worker for worker in self._fleet if worker.joined]
        if not workers:
            raise NoWorker(
                "no worker has joined; a control call has nobody to go to", field="workers"
            )
        outcomes = await asyncio.gather(*(self._one(worker, request) for worker in workers))
        whole = all(outcome.good for outcome in outcomes)
        self._metrics.fanned_out(whole=whole)
        return together(request, outcomes)

    async def _one(
        self, worker: Worker, request: ClientRequest, body: bytes | None = None
    ) -> Outcome:
        key = self._config.worker_admin_api_key or self._config.worker_api_key
        headers = [
            (name, value)
            for name, value in request.headers
            if name == b"content-type" or (name == b"authorization" and not key)
        ]
        worker.num_controls += 1
        try:
            reply = await call(
                worker,
                request.method,
                request.target.decode("latin-1"),
                body=request.body if body is None else body,
                headers=headers,
                key=key,
                timeout_s=CONTROL_S,
            )
        except SlipstreamError as error:
            self._joining.doubt(worker)
            return Outcome(worker, error=error)
        finally:
            worker.num_controls -= 1
            worker.alive()
        return Outcome(worker, reply)


def together(request: ClientRequest, outcomes: list[Outcome]) -> Reply:
    """One answer of all: the first worker's, with what each said below `workers`; if one did not
    take the call, an error that names all that did not."""
    told = {outcome.worker.url: outcome.told() for outcome in outcomes}
    bad = [outcome for outcome in outcomes if not outcome.good]
    if not bad:
        first = outcomes[0].reply
        assert first is not None
        return _with_workers(first, told)
    statuses = {outcome.reply.status for outcome in bad if outcome.reply is not None}
    names = ", ".join(outcome.worker.url for outcome in bad)
    why = "; ".join(_why(outcome) for outcome in bad)
    error = FanOutFailed(
        f"{request.path} failed on {names} of {len(outcomes)} workers: {why}",
        field=bad[0].worker.url,
    )
    same = statuses.pop() if len(statuses) == 1 and len(bad) == len(outcomes) else error.status
    body = {"success": False, "message": error.message, **error_body(error), "workers": told}
    return json_reply(msgspec.json.encode(body), same)


def _with_workers(reply: Reply, told: dict[str, Any]) -> Reply:
    try:
        found = msgspec.json.decode(reply.body)
    except msgspec.DecodeError:
        return reply
    if not isinstance(found, dict):
        return reply
    return json_reply(msgspec.json.encode({**found, "workers": told}))


def _why(outcome: Outcome) -> str:
    told = outcome.told()
    body = told.get("reply", told)
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("message", error))
    return str(body)[:300]
