"""A front process: `python -m rollout.http.fronts.front_main`, a `FrontSpec` on its stdin.

`rollout.http.fronts.front_processes` starts it. It writes a line to its stdout once it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

import httpx
import msgspec
import uvloop

from rollout.collector import settle
from rollout.http.app import build_app, front_paths
from rollout.http.config import ServeConfig
from rollout.http.engine.client import AsyncEngine
from rollout.http.fronts.front_app import FrontApp
from rollout.http.fronts.front_end import FOREVER_S, Follower
from rollout.http.fronts.news import NewsReader, ToldLabels
from rollout.http.fronts.owner_client import FrontReport, OwnerClient
from rollout.http.http_server import PatientServer, uvicorn_config
from rollout.http.services import make_services
from rollout.logs.logging_setup import LogLevel, set_up_logging
from rollout.metrics import FinishedSequence, Metrics
from rollout.text.tokenizer import find_tokenizer

_REPORT_S = 1.0
_SOON_S = 0.05
"""Between two reports, while there is something to say."""
_LOOK_S = 0.5


class FrontSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a front is started with.

    name: of this front, used once. listener: descriptor of its socket. news: path that the owner
    writes them to. owner: path of the owner's socket. parent: process to outlive by no more than
    a moment. has_text: whether the model came with a tokenizer.
    """

    config: ServeConfig
    name: str
    listener: int
    news: str
    owner: str
    parent: int
    has_text: bool


class Reporter:
    """Tells the owner what ended here, and that this front is alive."""

    def __init__(self, name: str, owner: OwnerClient) -> None:
        self._name = name
        self._owner = owner
        self._finished: list[FinishedSequence] = []
        self._some = asyncio.Event()

    def add(self, found: FinishedSequence) -> None:
        """Report a sequence soon."""
        self._finished.append(found)
        self._some.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._some.wait(), _REPORT_S)
            await self.flush()
            await asyncio.sleep(_SOON_S)

    async def flush(self) -> None:
        """Report what there is; again with the next report if the owner takes none."""
        self._some.clear()
        finished, self._finished = self._finished, []
        try:
            await self._owner.report(FrontReport(name=self._name, finished=finished))
        except httpx.HTTPError:
            self._finished = finished + self._finished


def main(data: bytes) -> None:
    """Serve until told to leave, or orphaned."""
    spec = msgspec.json.decode(data, type=FrontSpec)
    config = spec.config
    # What goes on as it should, the owner says for all.
    level: LogLevel = "error" if config.log_level == "error" else "warning"
    set_up_logging(config.log_format, level, process=spec.name, access=config.access_log)
    listener = socket.socket(fileno=spec.listener)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(spec, listener))


async def _serve(spec: FrontSpec, listener: socket.socket) -> None:
    config, reader, owner = spec.config, NewsReader(Path(spec.news)), OwnerClient(spec.owner)
    tokenizer = find_tokenizer(config.engine.model) if spec.has_text else None
    follower, reporter = Follower(reader, spec.name), Reporter(spec.name, owner)
    engine = AsyncEngine(follower.link(), reply_s=FOREVER_S, slow_s=FOREVER_S)
    follower.follow(engine)
    await engine.start()
    services = make_services(
        config,
        engine,
        tokenizer,
        labels=ToldLabels(reader),
        metrics=Metrics(config.model_name, report=reporter.add),
        front=spec.name,
    )
    app = FrontApp(build_app(services), front_paths(services), reader, owner)
    settle()
    headers = [("x-served-by", spec.name)]
    served = uvicorn_config(config, app, headers=headers)
    server = PatientServer(served, engine, drain_s=config.drain_timeout_s)
    tasks = [
        asyncio.create_task(work)
        for work in (reporter.run(), _leave_orphaned(spec.parent, server), _say_ready(server))
    ]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await follower.close()
        await reporter.flush()
        await owner.close()


async def _say_ready(server: PatientServer) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    os.write(sys.stdout.fileno(), b"ready\n")


async def _leave_orphaned(parent: int, server: PatientServer) -> None:
    while os.getppid() == parent:
        await asyncio.sleep(_LOOK_S)
    server.begin_to_leave()


if __name__ == "__main__":
    main(sys.stdin.buffer.read())
