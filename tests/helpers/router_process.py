"""A router as a process of its own, and servers of the fake engine that register with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx

from tests.helpers.serve_process import ServerProcess, fake_server

PATIENCE_S = 60.0

_ROUTER = """
import logging
from rollout.router.config import RouterConfig
from rollout.router.server import route
logging.basicConfig(level=logging.INFO)
route(RouterConfig(port=0, OPTIONS))
"""


def router_process(options: str = "") -> ServerProcess:
    """A router; `options` are keyword arguments of `RouterConfig`, as source text."""
    return ServerProcess(["-c", _ROUTER.replace("OPTIONS", options)])


def wait_for(router: str, count: int) -> None:
    """Until so many workers are in rotation."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = httpx.get(f"{router}/workers", trust_env=False).json()
        if found["stats"]["healthy_workers"] == count:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


@contextmanager
def fleet(
    count: int,
    *,
    engine: str = "",
    server: str = "",
    options: str = "",
    factory: str = "tests.helpers.fake_executor:build",
) -> Iterator[tuple[ServerProcess, list[ServerProcess]]]:
    """A router and `count` servers of the fake engine that have registered with it. factory: of
    their executors."""
    with ExitStack() as stack:
        router = stack.enter_context(router_process(options))
        code = fake_server(engine, f"router={router.url!r}, {server}", factory=factory)
        workers = [stack.enter_context(ServerProcess(["-c", code])) for _ in range(count)]
        wait_for(router.url, count)
        yield router, workers
