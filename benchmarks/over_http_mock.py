"""An engine that costs nothing, and what a bare server costs, for `benchmarks/over_http.py`.

`python benchmarks/over_http_mock.py serve N [MS]`: the whole server, with `--http-processes N`,
before a model that draws tokens at random and takes MS milliseconds a step, as a GPU does: the host
plans meanwhile. `python benchmarks/over_http_mock.py echo`: uvicorn with
nothing behind it, which sends bodies back. Both print "port" and its number once they listen.
"""

from __future__ import annotations

import re
import socket
import sys
import time
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

_MOST_ROWS = 4096
_ADDRESS = re.compile(r"serving .* at http://[^:]+:(\d+)")


@dataclass(frozen=True)
class Ready:
    """A step, or a command. ready_at: when it is done, by `time.perf_counter`."""

    outcome: Any
    ready_at: float = 0.0

    def done(self) -> bool:
        return time.perf_counter() >= self.ready_at

    def result(self) -> Any:
        left_s = self.ready_at - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return self.outcome


class MockExecutor:
    """Gives every row that samples a token drawn beforehand. Its steps take turns, each as long as
    the name of the model says behind an @, in seconds."""

    def __init__(self, config: EngineConfig) -> None:
        self._step_s = float(config.model.partition("@")[2] or 0.0)
        self._free_at = 0.0
        rng = np.random.default_rng(0)
        self._ids = rng.integers(3, 32000, 2 * _MOST_ROWS).astype(np.int32)
        self._logprobs = -rng.exponential(1.0, 2 * _MOST_ROWS).astype(np.float32)
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
        return self.launch(plan).result()  # type: ignore[no-any-return]

    def launch(self, plan: StepPlan) -> Ready:
        rows = int(np.count_nonzero(plan.samples))
        at = plan.step % _MOST_ROWS
        result = StepResult(
            step=plan.step,
            token_ids=self._ids[at : at + rows],
            logprobs=self._logprobs[at : at + rows],
        )
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s
        return Ready(result, self._free_at)

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


def mock_config(step_ms: float) -> EngineConfig:
    """An engine whose steps take so long; planned one ahead if they take any time."""
    return EngineConfig(
        model=f"mock@{step_ms / 1e3}",
        cache=CacheConfig(page_size=16),
        scheduler=SchedulerConfig(max_running=1024, max_waiting=8192, overlap=step_ms > 0),
    )


def serve(processes: int, step_ms: float) -> None:
    """The whole server, until it is told to stop."""
    import logging

    logging.basicConfig(level=logging.INFO, stream=_Told(), format="%(message)s")
    server.find_tokenizer = lambda model: None
    engine = mock_config(step_ms)
    config = ServeConfig(
        engine=engine,
        port=0,
        http_processes=processes,
        served_model_name="mock",
        incremental_streaming_output=True,
    )
    server.serve(config, factory="over_http_mock:build")


def main() -> None:
    """See the module."""
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
        return
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(f"port {listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        echo, http="httptools", loop="uvloop", log_config=None, access_log=False, lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
