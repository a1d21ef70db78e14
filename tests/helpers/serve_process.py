"""Servers as processes of their own, over a real model or the fake engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import EngineDead
from rollout.client import Client
from tests.helpers.children import ROOT, child_environment

_ADDRESS = re.compile(r"serving .* at (http://\S+)")

FAKE = """
import logging
from engine.config import ParallelConfig
from rollout.http import server
from rollout.http.config import ServeConfig
from tests.helpers.replicas import fake_config
logging.basicConfig(level=logging.INFO)
server.find_tokenizer = lambda model: None
config = ServeConfig(engine=fake_config(), port=0)
server.serve(config, factory="tests.helpers.fake_executor:build")
"""


def fake_server(
    engine: str = "", server: str = "", *, factory: str = "tests.helpers.fake_executor:build"
) -> str:
    """Code of a server of the fake engine; `engine` and `server` are keyword arguments of
    `fake_config` and `ServeConfig`, as source text. factory: what builds a rank."""
    code = FAKE.replace("fake_config()", f"fake_config({engine})")
    code = code.replace("tests.helpers.fake_executor:build", factory)
    return code.replace("port=0)", f"port=0, {server})")


FAKE_WITH_TEXT = FAKE.replace(
    "server.find_tokenizer = lambda model: None",
    "from tests.helpers.tiny_tokenizer import tiny_tokenizer\n"
    "server.find_tokenizer = lambda model: tiny_tokenizer()",
)


class ServerProcess:
    """`python ARGUMENTS` in a process, killed at the end. url: where it serves."""

    def __init__(self, arguments: Sequence[str], *, start_s: float = 120.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._found = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._found.wait(start_s) or not self.url:
            self.close()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))

    def client(self) -> Client:
        """A new client of it."""
        return Client(self.url, generate_s=60.0, control_s=60.0)

    def children(self) -> list[int]:
        """Processes it started that still run."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def wait_for_another(self, client: Client, most_s: float = 120.0) -> None:
        """Until another engine answers, in place of one that died."""
        deadline = time.monotonic() + most_s
        while True:
            try:
                client.state()
                return
            except EngineDead as error:
                assert self.process.poll() is None, "the server has left"
                assert time.monotonic() < deadline, f"no other engine came: {error}"
            time.sleep(0.05)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def close(self) -> None:
        """Kill what is left and close the pipe."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(120)
        self._reader.join(60)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = _ADDRESS.search(line)
            if found is not None:
                self.url = found.group(1)
                self._found.set()
        self._found.set()


def gone(pid: int, timeout_s: float = 60.0) -> bool:
    """Whether a process has left, or leaves in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False
