"""Clients of a server of several fronts, each of one of them, and of what runs behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.serve_process import ServerProcess, fake_server

PATIENCE_S = 60.0


def fronts_server(engine: str = "", server: str = "", *, count: int = 2) -> ServerProcess:
    """A server of the fake engine with `count` fronts; see `fake_server` for the rest."""
    return ServerProcess(["-c", fake_server(engine, f"http_processes={count}, {server}")])


@contextmanager
def client_of(server: ServerProcess, front: str) -> Iterator[httpx.Client]:
    """A client whose one connection is to `front`, by its name without what follows a dot."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
            served_by = client.get("/health").headers["x-served-by"]
            if served_by.partition(".")[0] == front:
                yield client
                return
        assert time.monotonic() < deadline, f"no connection came to {front}"


def state_of(client: httpx.Client) -> dict[str, Any]:
    """What the engine is and does."""
    found: dict[str, Any] = client.post("/command", json={"type": "get_state"}).json()["state"]
    return found


def pids_of(server: ServerProcess) -> dict[str, int]:
    """The children of a server: "leader", and "front" and a number for each front."""
    found: dict[str, int] = {}
    for pid in sorted(server.children()):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        is_front = b"front_main" in command
        name = f"front{sum('front' in name for name in found) + 1}" if is_front else "leader"
        found[name] = pid
    return found
