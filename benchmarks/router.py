"""What the router costs, in one run, beside no router and, where one is named, sglang-router.

    python benchmarks/router.py
    python benchmarks/router.py --only choices
    python benchmarks/router.py --beside "OTHER/bin/python -m sglang_router.launch_router"

requests: 512 ids in, two workers that cost next to nothing (`router_upstreams.py`), 64 connections:
    requests a second, the median of what a reply takes, and the router's processor time a request.
    Sides take turns: direct, router with its journal, without, and beside.
latency: the same with one connection: what the router adds to a reply.
choices: see `router_choices.py`.
kills: see `router_kills.py`. Not of `--only` by default.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import checkout
import router_choices
import router_kills
import tyro
from machine import describe
from over_http_children import Child
from process_times import between, seconds_by_role

Part = Literal["requests", "latency", "choices", "kills"]
NUM_IDS = 512


@dataclass(frozen=True)
class Options:
    """What to measure."""

    only: tuple[Part, ...] = ("requests", "latency", "choices")
    """Parts, in order."""
    rounds: int = 5
    """Times that each side is measured."""
    count: int = 6000
    """Requests of one measurement."""
    connections: int = 64
    """Of requests."""
    beside: str = ""
    """A command that launches sglang-router, to be measured too."""
    json: Path | None = None
    """Write the figures to this file."""


class Routed:
    """A router in a process of its own; pid, port: its."""

    def __init__(self, command: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._child = subprocess.Popen(
            [*command, "--port", str(self.port)],
            env=checkout.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self._child.pid
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._child.poll() is None and time.monotonic() < deadline, command
            time.sleep(0.2)

    def _answers(self) -> bool:
        body = json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 1}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate",
            data=body,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def close(self) -> None:
        """End it."""
        self._child.terminate()
        self._child.wait(60)


def serve(options: Options, part: str) -> dict[str, Any]:
    """Figures of every side, each the median of its rounds."""
    connections = options.connections if part == "requests" else 1
    count = options.count if part == "requests" else options.count // 6
    load, upstreams = Child("over_http_load.py"), Child("router_upstreams.py")
    ports = upstreams.line().split()[1:]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    ours = [sys.executable, "-m", "rollout", "router"]
    for url in urls:
        ours += ["--worker", url]
    sides = {"journal": Routed(ours), "no_journal": Routed([*ours, "--no-journal"])}
    if options.beside:
        command = [*shlex.split(options.beside), "--policy", "cache_aware"]
        sides["beside"] = Routed([*command, "--worker-urls", *urls])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("direct", *sides)}
    try:
        for number in range(options.rounds + 1):
            ids = list(range(1000 + number, 1000 + number + NUM_IDS))
            body = json.dumps({"input_ids": ids, "sampling_params": {"max_new_tokens": 16}})
            for name in found:
                side = sides.get(name)
                port = int(ports[0]) if side is None else side.port
                job = {"do": "closed", "port": port, "path": "/generate", "body": body}
                job |= {"connections": connections, "count": count}
                before = {} if side is None else seconds_by_role(side.pid)
                measured = load.ask(job)
                assert measured["statuses"] == ["200"], (name, measured)
                figures = {
                    "per_s": count / measured["seconds"],
                    "p50_ms": 1e3 * measured["p50_s"],
                }
                if side is not None:
                    spent = sum(between(before, seconds_by_role(side.pid)).values())
                    figures["processor_us"] = 1e6 * spent / count
                if number:  # the first round warms all of them up
                    found[name].append(figures)
    finally:
        for side in sides.values():
            side.close()
        for child in (load, upstreams):
            child.close()
    return {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }


def _measure(options: Options, part: Part) -> dict[str, Any]:
    if part == "kills":
        return router_kills.measure()
    return router_choices.measure() if part == "choices" else serve(options, part)


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options, description=__doc__)
    report: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        # What is not measured now stays.
        report = json.loads(options.json.read_text())
    report |= {"machine": describe(), "cores": len(os.sched_getaffinity(0))}
    for part in options.only:
        report[part] = _measure(options, part)
        print(part, json.dumps(report[part], indent=2), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
