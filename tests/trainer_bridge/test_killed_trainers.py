"""Trainers killed at every stage of a push, by every carrier, and the trainer that follows."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import SlipstreamError
from engine.protocol import Command, Reply
from rollout.replica.command_replies import error_info
from tests.helpers.doomed_trainers import trained
from tests.helpers.engines import make_replica
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge.bridge import Publisher, PushOptions

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["begin", "carry", "prepare", "commit"]
CASES = [
    (transport, stage, mode)
    for transport in ("nccl", "cuda_ipc", "disk")
    for stage in STAGES
    for mode in ("shadow", "undo", "in_place")
    if mode == "shadow" or stage == "carry"
]


class Engines(ThreadingHTTPServer):
    """Inline engines behind `POST /PLACE/command`."""

    daemon_threads = True

    def __init__(self, model: Path, num: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.engines = [make_replica(model, num_pages=32) for _ in range(num)]
        self.locks = [threading.Lock() for _ in range(num)]

    def run(self, place: int, command: Command) -> Reply:
        with self.locks[place]:
            return self.engines[place].send(command)


class _Handler(BaseHTTPRequestHandler):
    server: Engines

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        place = int(self.path.split("/")[1])
        try:
            reply, status = self.server.run(place, msgspec.json.decode(body, type=Command)), 200
            data = msgspec.json.encode(reply)
        except SlipstreamError as error:
            info = error_info(error)
            told = {"type": info.kind, "message": info.message, "field": info.field}
            data, status = msgspec.json.encode({"error": told}), error.status
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Tests stay quiet."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Engines]]:
    """The model that was served before, and the engines after every trainer was killed."""
    folder = tmp_path_factory.mktemp("tiny")
    old = write_tiny(folder, "qwen2", tie_word_embeddings=True)
    server = Engines(folder, len(CASES))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    lines = [f"{' '.join(case)} {url}/{place}\n" for place, case in enumerate(CASES)]
    trainers = subprocess.run(
        [sys.executable, "-m", "tests.helpers.doomed_trainers"],
        cwd=ROOT,
        input="".join(lines),
        stdout=subprocess.PIPE,
        text=True,
        timeout=150,
        check=True,
    )
    assert trainers.stdout.split() == ["9"] * len(CASES), trainers.stdout
    yield old, server
    server.shutdown()
    server.server_close()
    for engine in server.engines:
        engine.close()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_engine_outlives_its_trainer_and_takes_the_next_one(served, case) -> None:
    old, server = served
    place, (_, stage, mode) = CASES.index(case), case
    engine, lock = server.engines[place], server.locks[place]
    deadline = time.monotonic() + 60
    while True:
        with lock:
            engine.step()
            state = engine.state()
        if state.open_update is None:
            break
        assert time.monotonic() < deadline, "the update of a dead trainer stays open"
        time.sleep(0.05)
    with lock:
        if stage == "commit":
            assert state.version == 1
            assert logprob_gap(engine, trained(), "new") < 1e-4
        else:
            assert state.version == 0
            if mode != "in_place":
                assert logprob_gap(engine, old, "old") < 1e-4
        model = tiny_hf("qwen2", seed=60, tie_word_embeddings=True)
        options = PushOptions(transport=case[0], bucket_bytes=4096, timeout_s=60.0)
        with Publisher(model, [engine], options) as publisher:
            publisher.push(2)
        assert logprob_gap(engine, model, "next") < 1e-4
