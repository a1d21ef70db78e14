"""How long `/health` takes while a server on a GPU takes weight updates.

    python benchmarks/health_during_update.py --model benchmarks/shapes/qwen2.5-7b.json

A server of random weights decodes `--rows` requests; a trainer on the same GPU pushes all weights
by CUDA IPC, again and again, or by files; another process asks `/health` every 5 ms. Milliseconds
of its answers, before the updates and during them.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import checkout
import torch
import tyro
from machine import describe
from weight_update_trainer import TensorList, TrainerJob, free_port

from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.http_target import HttpTarget


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json."""
    transport: Literal["cuda_ipc", "disk"] = "cuda_ipc"
    """How the weights travel."""
    updates: int = 20
    """Updates to push."""
    rows: int = 16
    """Requests that decode meanwhile."""
    every_s: float = 0.005
    """From one question to the next."""
    json: str | None = None
    """Write the figures to this file."""


def poll(port: int, every_s: float, pipe: Connection) -> None:
    """Ask until told to stop; every answer's begin (time.time) and seconds."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.connect()
    link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found: list[tuple[float, float]] = []
    while not pipe.poll(0):
        begun, started = time.time(), time.perf_counter()
        link.request("GET", "/health")
        answer = link.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        found.append((begun, time.perf_counter() - started))
        time.sleep(every_s)
    pipe.send(found)


def tensors_of(model: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names and shapes of a causal model of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(Path(model).read_text())
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return [(name, "bfloat16", tuple(p.shape)) for name, p in module.named_parameters()]


def decode(port: int, rows: int, stop: threading.Event) -> None:
    """Keep a batch of long requests going."""
    sampling = {"max_new_tokens": 3000, "ignore_eos": True}
    ids = [list(range(row, row + 8)) for row in range(rows)]
    body = json.dumps({"input_ids": ids, "sampling_params": sampling}).encode()
    headers = {"Content-Type": "application/json"}
    while not stop.is_set():
        request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                answer.read()
        except OSError:
            return


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def summary(times: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ranked = sorted(1e3 * seconds for seconds in times)
    at = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
    return {
        "answers": len(ranked),
        **{name: ranked[min(len(ranked) - 1, int(q * len(ranked)))] for name, q in at.items()},
    }


def measure(options: Options, port: int) -> dict[str, Any]:
    """Push under load."""
    job = TrainerJob(
        rank=0,
        world_size=1,
        port=0,
        raw_port=0,
        device="cuda",
        gpu=0,
        tensors=tensors_of(options.model),
        transport=options.transport,
        updates=options.updates,
        cycles=0,
        checksums=False,
        mode="auto",
        zero3=False,
    )
    source = TensorList(job)
    target = HttpTarget(f"http://127.0.0.1:{port}")
    stop = threading.Event()
    threading.Thread(target=decode, args=(port, options.rows, stop), daemon=True).start()
    time.sleep(2)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    poller = context.Process(target=poll, args=(port, options.every_s, theirs))
    poller.start()
    time.sleep(5)
    pushes: list[tuple[float, float]] = []
    with Publisher(source, [target], PushOptions(transport=options.transport)) as publisher:
        for version in range(1, options.updates + 1):
            begun = time.time()
            publisher.push(version)
            pushes.append((begun, time.time()))
            time.sleep(0.05)
        stop.set()
        pipe.send("stop")
        answers: list[tuple[float, float]] = pipe.recv()
    poller.join(30)
    during = [s for at, s in answers if any(a <= at + s and at <= b for a, b in pushes[1:])]
    first = [s for at, s in answers if pushes[0][0] <= at + s and at <= pushes[0][1]]
    return {
        "num_bytes": TensorList.num_bytes_of(job.tensors),
        "push_s": [end - begun for begun, end in pushes],
        "before": summary([s for at, s in answers if at + s < pushes[0][0]]),
        "first update": summary(first),
        "updates": summary(during),
    }


def main() -> None:
    """Serve, measure, print."""
    options = tyro.cli(Options, description=__doc__)
    port = free_port()
    words = ["--model", options.model, "--load-format", "random", "--port", str(port)]
    words += ["--dtype", "bfloat16", "--device", "cuda", "--kv-memory", "4"]
    words += ["--context-length", "4096"]
    log = tempfile.TemporaryFile()  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-m", "rollout", "serve", *words],
        stdout=log,
        stderr=log,
        env=checkout.environment(),
    )
    try:
        wait_for(port, server)
        result = measure(options, port)
    except BaseException:
        log.seek(0)
        print(log.read().decode()[-4000:])
        raise
    finally:
        server.terminate()
        server.wait(60)
    for name in ("before", "first update", "updates"):
        row = result[name]
        print(
            f"{name:14s} {row['answers']:6.0f} answers  p50 {row['p50_ms']:7.2f}  "
            f"p99 {row['p99_ms']:7.2f}  max {row['max_ms']:7.2f} ms"
        )
    if options.json:
        head = {"machine": describe(), "torch": torch.__version__}
        used = {**asdict(options), "model": Path(options.model).name, "json": None}
        Path(options.json).write_text(json.dumps({**head, "options": used, **result}, indent=1))


if __name__ == "__main__":
    main()
