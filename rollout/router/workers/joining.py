"""How a worker comes into rotation: it is asked what it is, and must be what the fleet is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from engine.errors import SlipstreamError
from rollout.router.workers.call import call_json
from rollout.router.workers.facts import Facts, facts_of
from rollout.router.workers.registry import Fleet
from rollout.router.workers.worker import Worker

logger = logging.getLogger(__name__)

ASKED_BY_ROUTER = b"x-slipstream-router"
"""On the call that asks a worker what it is: who passes it on is none."""
_FIRST_WAIT_S = 0.05
_MOST_WAIT_S = 2.0
_ASK_S = 10.0

Republish = Callable[[Worker], Awaitable[bool]]


class Joining:
    """Looks at workers until each has answered. key: of the workers' routes. republish: tries to
    give a worker the weights of the fleet; whether it has them now."""

    def __init__(self, fleet: Fleet, *, key: str) -> None:
        self._fleet = fleet
        self._key = key
        self._looking: dict[Worker, asyncio.Task[None]] = {}
        self.republish: Republish | None = None

    def look(self, worker: Worker) -> None:
        """Ask it what it is, and again until it answers or is dropped."""
        if worker not in self._looking:
            task = asyncio.get_running_loop().create_task(self._look(worker))
            self._looking[worker] = task
            task.add_done_callback(lambda task: self._ended(worker, task))

    def doubt(self, worker: Worker) -> None:
        """It was lost or could not be reached: it may be asked again once it has answered, since
        what answers there may be another process."""
        worker.joined = False
        worker.epoch += 1
        self._fleet.touch()
        self.look(worker)

    async def close(self) -> None:
        """Stop looking."""
        tasks = list(self._looking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def refresh(self, worker: Worker) -> None:
        """Ask it once what it is, and judge it. Raises WorkerLost and what it refuses with."""
        facts = await call_json(
            worker,
            "GET",
            "/server_info",
            headers=[(ASKED_BY_ROUTER, b"1")],
            key=self._key,
            timeout_s=_ASK_S,
        )
        self._take(worker, facts_of(worker.url, facts))

    def _ended(self, worker: Worker, task: asyncio.Task[None]) -> None:
        self._looking.pop(worker, None)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.error("looking at %s failed", worker.url, exc_info=error)
        elif not worker.joined and worker in self._fleet:
            # It was doubted again just when it had answered.
            self.look(worker)

    async def _look(self, worker: Worker) -> None:
        wait_s, told = _FIRST_WAIT_S, False
        while worker in self._fleet:
            try:
                await self.refresh(worker)
            except SlipstreamError as error:
                worker.why = error.message
                if not told:
                    logger.info("%s", error)
                    told = True
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _MOST_WAIT_S)
                continue
            if not worker.held or self.republish is None or not await self.republish(worker):
                break
        if worker.in_rotation:
            self._fleet.changed()

    def _take(self, worker: Worker, facts: Facts) -> None:
        worker.facts, worker.joined, worker.why = facts, True, ""
        worker.heard_at = time.monotonic()
        if facts.version != worker.version:
            worker.version, worker.epoch = facts.version, worker.epoch + 1
        self.judge(worker)

    def judge(self, worker: Worker) -> None:
        """Say whether one that has answered may be asked, by what it answered last."""
        held = self._fault(worker)
        if held != worker.held:
            logger.info("%s %s", worker.url, held or "is in rotation")
        worker.held = held
        self._fleet.touch()

    def _fault(self, worker: Worker) -> str:
        """Why a worker that answered may not be asked, or ""."""
        model = worker.facts.model
        self._fleet.model = self._fleet.model or model
        worker.alike = model == self._fleet.model
        if not worker.alike:
            return f"serves the model {model!r}, and the fleet {self._fleet.model!r}"
        if refusal := worker.facts.refusal:
            return f"waits to be published to: {refusal}"
        wanted = self._fleet.version
        if wanted is not None and worker.version != wanted:
            return (
                f"has the weights {worker.version!r}, and the fleet serves {wanted!r}: publish "
                f"{wanted!r} to it"
            )
        return ""
