"""Whether workers that have requests still get anywhere, and what idle ones have become.

What comes of open requests is the sign of life: no worker is asked how it is while it has something
to say, nor while a control call is on it, which may keep it silent for minutes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from engine.errors import SlipstreamError
from rollout.router.config import RouterConfig
from rollout.router.errors import WorkerLost
from rollout.router.workers.call import call
from rollout.router.workers.joining import Joining
from rollout.router.workers.registry import Fleet
from rollout.router.workers.worker import Worker

logger = logging.getLogger(__name__)

_PROBE_S = 10.0
_LOOK_EVERY_S = 5.0


class Watch:
    """Looks at every worker once a second."""

    def __init__(self, fleet: Fleet, joining: Joining, config: RouterConfig) -> None:
        self._fleet = fleet
        self._joining = joining
        self._silence_s = config.silence_s
        self._looked: dict[Worker, float] = {}
        self._tasks: dict[Worker, asyncio.Task[None]] = {}

    def tick(self, now: float) -> None:
        """Ask those whose time has come. now: of the monotonic clock."""
        for worker in list(self._fleet):
            if worker.num_controls or not worker.joined or worker in self._tasks:
                continue
            silent_s = now - worker.heard_at
            if worker.num_open and silent_s > self._silence_s:
                self._start(worker, self._probe(worker))
            elif not worker.num_open and now - self._looked.get(worker, now) > _LOOK_EVERY_S:
                self._looked[worker] = now
                self._joining.look(worker)
            self._looked.setdefault(worker, now)
        for gone in self._looked.keys() - set(self._fleet):
            del self._looked[gone]

    async def close(self) -> None:
        """Ask nobody any more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, worker: Worker, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[worker] = task
        task.add_done_callback(lambda _: self._tasks.pop(worker, None))

    async def _probe(self, worker: Worker) -> None:
        """Ask a silent worker whether it is well, as one that drains is; else it is lost."""
        try:
            reply = await call(worker, "GET", "/liveness", timeout_s=_PROBE_S)
        except WorkerLost as error:
            self._end(worker, error)
            return
        if reply.status == 200:
            worker.alive()
        else:
            why = reply.body[:300].decode(errors="replace")
            self._end(worker, WorkerLost(f"{worker.url} is not well: {why}", field="worker"))

    def _end(self, worker: Worker, error: SlipstreamError) -> None:
        if worker.num_controls:
            return
        logger.warning("%s; its requests go on elsewhere", error)
        self._joining.doubt(worker)
        worker.cut()
