"""Processes of `benchmarks/over_http.py`: its own scripts, and the server."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import checkout

from engine.config import EngineConfig

FOLDER = Path(__file__).parent


def split_cores() -> tuple[set[int], set[int]]:
    """Cores of the clients, and of whatever is measured."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 8:
        return set(cores), set(cores)
    return set(cores[-2:]), set(cores[:-2])


class Child:
    """A script of this folder that answers one JSON line with another."""

    def __init__(self, script: str, *args: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(FOLDER / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=checkout.environment(),
            text=True,
        )
        clients, others = split_cores()
        os.sched_setaffinity(self.pid, clients if script == "over_http_load.py" else others)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._child.pid

    def line(self) -> str:
        """The next line that it prints."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, f"{self._child.args} ended"
        return line

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(job) + "\n")
        self._child.stdin.flush()
        found: dict[str, Any] = json.loads(self.line())
        return found

    def close(self) -> None:
        """End it."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.terminate()
        self._child.wait(60)


class Listening(Child):
    """A script that prints where it listens. port: there."""

    def __init__(self, script: str, *args: str) -> None:
        super().__init__(script, *args)
        found = re.match(r"port (\d+)", self.line())
        assert found is not None
        self.port = int(found.group(1))


class Server:
    """`python -m rollout serve` of the model, in a process of its own."""

    def __init__(self, config: EngineConfig, processes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "rollout", "serve", "--model", config.model]
        command += ["--load-format", config.load_format, "--port", str(self.port)]
        command += ["--device", config.device, "--dtype", config.dtype]
        command += ["--context-length", str(config.context_length), "--max-waiting", "8192"]
        command += ["--max-running", str(config.scheduler.max_running)]
        command += ["--http-processes", str(processes), "--incremental-streaming-output"]
        if config.cache.memory_bytes is not None:
            command += ["--kv-memory", str(config.cache.memory_bytes / (1 << 30))]
        self._child = subprocess.Popen(command, env=checkout.environment())
        os.sched_setaffinity(self.pid, split_cores()[1])
        deadline = time.monotonic() + 600
        while not self._answers():
            assert self._child.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._child.pid

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def close(self) -> None:
        """End it."""
        self._child.terminate()
        self._child.wait(60)
