"""An engine that costs nothing, and what a bare server costs, for `benchmarks/over_http.py`.

`python benchmarks/over_http_mock.py serve N`: the whole server, with `--http-processes N`, before a
model that draws one token over and over. `python benchmarks/over_http_mock.py echo`: uvicorn with
nothing behind it, which sends bodies back. Both print "port" and its number once they listen.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import numpy as np
import uvicorn

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.protocol import EngineFacts, Reply, StepMasks, StepPlan, StepResult, WeightCommand
from rollout.http import server
from rollout.http.config import ServeConfig

TOKEN = 7
_ADDRESS = re.compile(r"serving .* at http://[^:]+:(\d+)")


@dataclass(frozen=True)
class Ready:
    """A step that is done, or a command."""

    outcome: Any

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self.outcome


class MockExecutor:
    """Gives every row that samples the same token."""

    def __init__(self, config: EngineConfig) -> None:
        self.facts = EngineFacts(
            model=config.model,
            num_pages=1 << 16,
            page_size=config.cache.page_size,
            context_length=4096,
            vocab_size=32000,
            eos_ids=[2],
            dtype="float32",
            device="cpu",
            attention="mock",
        )

    def execute(self, plan: StepPlan) -> StepResult:
        rows = int(np.count_nonzero(plan.samples))
        return StepResult(
            step=plan.step,
            token_ids=np.full(rows, TOKEN, np.int32),
            logprobs=np.full(rows, -0.25, np.float32),
        )

    def launch(self, plan: StepPlan) -> Ready:
        return Ready(self.execute(plan))

    def mask(self, masks: StepMasks) -> None:
        raise NotImplementedError("no request of the benchmark waits for masks")

    def handle(self, command: WeightCommand) -> Reply:
        return Reply()

    def start(self, command: Any) -> Ready:
        return Ready(Reply())

    def cancel(self, reason: str, *, group: str = "") -> None:
        pass

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        pass

    def close(self) -> None:
        pass


def build(config: EngineConfig) -> MockExecutor:
    """The factory that a leader is given by name."""
    return MockExecutor(config)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The body of every request, sent back."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Told:
    """A stream of log lines, which prints the port that one of them tells."""

    def write(self, text: str) -> None:
        if found := _ADDRESS.search(text):
            print(f"port {found.group(1)}", flush=True)

    def flush(self) -> None:
        pass


def serve(processes: int) -> None:
    """The whole server, until it is told to stop."""
    import logging

    logging.basicConfig(level=logging.INFO, stream=_Told(), format="%(message)s")
    server.find_tokenizer = lambda model: None
    engine = EngineConfig(
        model="mock",
        cache=CacheConfig(page_size=16),
        scheduler=SchedulerConfig(max_running=256, max_waiting=8192),
    )
    config = ServeConfig(engine=engine, port=0, http_processes=processes)
    server.serve(config, factory="over_http_mock:build")


def main() -> None:
    """See the module."""
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
        return
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(f"port {listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        echo, http="httptools", loop="uvloop", log_config=None, access_log=False, lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
