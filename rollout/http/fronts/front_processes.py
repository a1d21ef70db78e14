"""The front processes of a server: started, watched, started again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.errors import EngineDead
from engine.protocol.deadlines import SILENT_S
from rollout.http.config import ServeConfig
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.failure_window import MAX_FAILURES, WINDOW_S, FailureWindow
from rollout.http.fronts.front_main import FrontSpec
from rollout.http.fronts.owner_client import FrontReport
from rollout.http.http_server import GRACE_S, PATIENCE_S
from rollout.metrics import Metrics
from rollout.replica.python_child import child_command, child_environment

logger = logging.getLogger(__name__)

_START_S = 120.0
_LEAVE_S = PATIENCE_S + GRACE_S + 2.0
_LOOK_S = 1.0


@dataclass
class _Front:
    """One process. name: used once. heard_at: of its last report, by `time.monotonic`."""

    name: str
    process: asyncio.subprocess.Process
    heard_at: float


class FrontProcesses:
    """The fronts of one engine, one for each of `listeners`.

    A front that ends has its requests ended in the engine. `--restart on-failure` starts another in
    its place, which goes on with its socket, so that connections that nobody has accepted wait
    for it; at the third failure within ten minutes, and at the first with `never`, `give_up` is
    called with the reason. A front that says nothing for long is ended. folder: where the news and
    the owner's socket are; metrics: count what ends in the fronts.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine: AsyncEngine,
        listeners: Sequence[socket.socket],
        folder: Path,
        *,
        has_text: bool,
        metrics: Metrics,
        give_up: Callable[[EngineDead], None],
    ) -> None:
        self._config = config
        # All together hold what one process may, each at least one body of the largest size.
        self._of_fronts = dataclasses.replace(
            config,
            max_held_body_bytes=max(
                config.max_held_body_bytes // len(listeners), 2 * config.max_body_bytes
            ),
        )
        self._engine = engine
        self._listeners = listeners
        self._folder = folder
        self._has_text = has_text
        self._metrics = metrics
        self._give_up = give_up
        self._fronts: dict[int, _Front] = {}
        self._failures = FailureWindow()
        self._num_started = 0
        self._leaving = False
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all of them; they serve when this returns. Raises EngineDead if one cannot."""
        numbers = range(len(self._listeners))
        await asyncio.gather(*(self._start(number) for number in numbers))
        self._watches = [asyncio.create_task(self._watch(number)) for number in numbers]
        self._watches.append(asyncio.create_task(self._look()))

    def take_report(self, report: FrontReport) -> None:
        """Note what a front reports."""
        for finished in report.finished:
            self._metrics.count(finished)
        for front in self._fronts.values():
            if front.name == report.name:
                front.heard_at = time.monotonic()

    async def leave(self, drain_s: float = 0.0) -> None:
        """Tell all to answer what is open and leave, and wait until they have; kill those that do
        not. drain_s: how long requests have to finish before. Idempotent."""
        self._leaving = True
        processes = [front.process for front in self._fronts.values()]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if drain_s else signal.SIGINT)
        waits = [asyncio.ensure_future(process.wait()) for process in processes]
        if waits:
            await asyncio.wait(waits, timeout=_LEAVE_S + drain_s)
        self.kill()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*waits, *self._watches, return_exceptions=True)

    def kill(self) -> None:
        """End all at once. Idempotent."""
        self._leaving = True
        for front in self._fronts.values():
            with contextlib.suppress(ProcessLookupError):
                front.process.kill()

    async def _start(self, number: int) -> None:
        self._num_started += 1
        name = f"front-{number + 1}" + (f".{self._num_started}" if number in self._fronts else "")
        listener = self._listeners[number].fileno()
        spec = FrontSpec(
            config=self._of_fronts,
            name=name,
            listener=listener,
            news=str(self._folder / "news"),
            owner=str(self._folder / "owner"),
            parent=os.getpid(),
            has_text=self._has_text,
        )
        process = await asyncio.create_subprocess_exec(
            *child_command("rollout.http.fronts.front_main"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
            pass_fds=[listener],
            # A Ctrl-C here is not one there.
            start_new_session=True,
        )
        self._fronts[number] = _Front(name, process, time.monotonic())
        assert process.stdin is not None and process.stdout is not None
        # Keys of the server are in it, so it is in no argument and in no file.
        process.stdin.write(msgspec.json.encode(spec))
        process.stdin.close()
        ready = b""
        with contextlib.suppress(TimeoutError):
            ready = await asyncio.wait_for(process.stdout.readline(), _START_S)
        if not ready:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
            raise EngineDead(f"{name} did not start: it ended with code {code}", field="front")

    async def _watch(self, number: int) -> None:
        """Follow one front, and those that come in its place."""
        while True:
            front = self._fronts[number]
            code = await front.process.wait()
            if self._leaving:
                return
            cause = f"process {front.process.pid}, {front.name}, ended with code {code}"
            logger.error("%s", cause)
            self._engine.forget_front(front.name)
            if not await self._replaced(number, cause):
                return

    async def _replaced(self, number: int, cause: str) -> bool:
        """Whether another front serves in place of one that ended."""
        while True:
            if self._config.restart == "never":
                self._give_up(EngineDead(cause, field="front"))
                return False
            if not self._failures.may_try(time.monotonic()):
                cause += f"; fronts failed {MAX_FAILURES} times within {WINDOW_S:g} s"
                self._give_up(EngineDead(cause, field="front"))
                return False
            try:
                await self._start(number)
                return True
            except EngineDead as error:
                if self._leaving:
                    return False
                cause = error.message
                logger.error("%s", cause)

    async def _look(self) -> None:
        """End fronts that do not come along: what is sent to them would be kept for them."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for front in self._fronts.values():
                silent_s = time.monotonic() - front.heard_at
                if silent_s > SILENT_S and front.process.returncode is None:
                    logger.error(
                        "%s has said nothing for %.0f s and is ended", front.name, silent_s
                    )
                    front.process.kill()
