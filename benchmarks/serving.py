"""The HTTP server against `offline` on the same engine, and what it is like under a load.

`python benchmarks/serving.py [--json FILE] [--only tiny smollm2 open health] [--rounds 3]`.

tiny: 256 callers, one streaming POST each of 16 ids in and 64 out, random Llama of 2 layers, hidden
    size 64, vocabulary 49,152: time to the first token (p50) and tokens/s over those of
    `offline` given the same 256 at once. smollm2: 128 callers x 16 tokens, tokens/s.
open: 8,192 open streams, errors and growth of server and leader.
health: p99 of GET /health while one client does something large or odd.

Server, leader, `offline` and the callers are a process each; the sides alternate in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import checkout
import msgspec
import numpy as np
from machine import processor

from engine.config import CacheConfig, EngineConfig

SMOLLM2 = checkout.ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Worker:
    """A child that answers one JSON line with another."""

    def __init__(self, script: str, *args: str) -> None:
        command = [sys.executable, str(checkout.ROOT / "benchmarks" / script), *args]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self) -> dict[str, Any]:
        """The next line."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, f"{self._child.args} ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(job).encode() + b"\n")
        self._child.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)


class Server:
    """`python -m rollout serve` in a process of its own."""

    def __init__(self, config: EngineConfig, log: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "rollout", "serve", "--model", config.model]
        command += ["--load-format", config.load_format, "--port", str(self.port)]
        command += ["--device", "cpu", "--dtype", config.dtype, "--kv-memory", "1"]
        command += ["--context-length", str(config.context_length), *options]
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                command, env=checkout.environment(), stdout=out, stderr=out
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._child.poll() is None, f"the server ended; see {log}"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def pids(self) -> list[int]:
        """The server and its leader."""
        children = Path(f"/proc/{self._child.pid}/task/{self._child.pid}/children")
        return [self._child.pid, *map(int, children.read_text().split())]

    def memory(self) -> list[int]:
        """Resident bytes of each."""
        pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in self.pids()]
        return [count * os.sysconf("SC_PAGE_SIZE") for count in pages]

    def close(self) -> None:
        """End it."""
        self._child.terminate()
        self._child.wait(30)


def prompts(count: int, rng: np.random.Generator) -> list[list[int]]:
    """Prompts of 16 ids."""
    found: list[list[int]] = rng.integers(5, 40000, (count, 16)).tolist()
    return found


def bodies(ids: list[list[int]], max_new: int) -> list[dict[str, Any]]:
    """A streaming POST for each prompt."""
    sampling = {"max_new_tokens": max_new, "ignore_eos": True}
    return [{"input_ids": i, "sampling_params": sampling, "stream": True} for i in ids]


def compare(
    config: EngineConfig, log: Path, *, callers: int, max_new: int, rounds: int
) -> dict[str, Any]:
    """Server and `offline` in turn: medians over the rounds, and their ratios."""
    offline = Worker("serving_offline.py", msgspec.json.encode(config).decode())
    offline.read()
    server, load = Server(config, log), Worker("serving_load.py")
    rng, found = np.random.default_rng(0), []
    try:
        for number in range(rounds + 1):
            ids = prompts(callers, rng)
            batch = {"prompts": ids, "max_new": max_new, "stream": False}
            whole = offline.ask(batch)
            first = offline.ask({**batch, "prompts": prompts(callers, rng), "stream": True})
            sent = bodies(prompts(callers, rng), max_new)
            served = load.ask({"do": "streams", "port": server.port, "bodies": sent})
            assert served["errors"] == 0, served["example"]
            assert set(served["tokens"]) == {max_new}
            if number:  # the first round warms both up
                found.append(_figures(whole, first, served))
                print(json.dumps(found[-1]), flush=True)
    finally:
        load.close(), server.close(), offline.close()
    return {key: statistics.median(f[key] for f in found) for key in found[0]}


def _figures(
    whole: dict[str, Any], first: dict[str, Any], served: dict[str, Any]
) -> dict[str, float]:
    offline_rate = whole["tokens"] / whole["seconds"]
    served_rate = sum(served["tokens"]) / served["seconds"]
    offline_first, served_first = np.median(first["first_s"]), np.median(served["first_s"])
    return {
        "offline_tokens_s": offline_rate,
        "served_tokens_s": served_rate,
        "throughput_ratio": served_rate / offline_rate,
        "offline_first_p50_s": float(offline_first),
        "served_first_p50_s": float(served_first),
        "first_ratio": float(served_first / offline_first),
    }


def many_open(config: EngineConfig, log: Path, *, count: int, max_new: int) -> dict[str, Any]:
    """`count` streams open at once. Without a prefix cache, which would fill the KV pool with
    their prompts meanwhile: its pages take memory when they are first written."""
    server = Server(config, log, "--no-prefix-cache")
    load = Worker("serving_load.py")
    rng = np.random.default_rng(1)
    try:
        warm = bodies(prompts(256, rng), max_new)
        load.ask({"do": "streams", "port": server.port, "bodies": warm})
        base, stop = server.memory(), threading.Event()
        peaks = [0] * len(base)

        def look() -> None:
            while not stop.wait(0.1):
                peaks[:] = map(max, peaks, server.memory())

        looking = threading.Thread(target=look)
        looking.start()
        sent = bodies(prompts(count, rng), max_new)
        served = load.ask({"do": "streams", "port": server.port, "bodies": sent})
        stop.set()
        looking.join()
    finally:
        load.close(), server.close()
    return {
        "open": count,
        "errors": served["errors"],
        "seconds": served["seconds"],
        "growth_kb_each": (sum(peaks) - sum(base)) / count / 1000,
        "of_server_and_leader": [(p - b) / count / 1000 for p, b in zip(peaks, base, strict=True)],
        "example": served["example"],
    }


def health(config: EngineConfig, log: Path) -> dict[str, Any]:
    """Latencies of /health beside what one client does."""
    server, load = Server(config, log), Worker("serving_load.py")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        peer = {
            "master_address": "127.0.0.1",
            "master_port": silent.getsockname()[1],
            "rank_offset": 1,
            "world_size": 2,
            "group_name": "silent",
            "backend": "gloo",
        }
        many = {"input_ids": [5], "sampling_params": {"n": 1 << 31, "max_new_tokens": 4}}
        jobs = {
            "nothing": {"seconds": 3},
            "64 MiB of text": {"seconds": 30, "post": [["/generate", '{"text": "@"}', 64 << 20]]},
            "63 MiB of text": {"seconds": 30, "post": [["/generate", '{"text": "@"}', 63 << 20]]},
            "n over the limit": {"seconds": 30, "post": [["/generate", json.dumps(many), 0]]},
            "a silent rendezvous peer": {
                "seconds": 10,
                "post": [["/init_weights_update_group", json.dumps(peer), 0]],
            },
            "1,000 aborts": {"seconds": 60, "aborts": 1000},
        }
        found = {}
        try:
            for name, job in jobs.items():
                seen = load.ask({"do": "watch", "port": server.port, **job})
                times = np.array(seen["latencies_s"]) * 1000
                found[name] = {
                    "p50_ms": float(np.median(times)),
                    "p99_ms": float(np.percentile(times, 99)),
                    "max_ms": float(times.max()),
                    "looks": len(times),
                    "replies": seen["replies"],
                }
                print(name, json.dumps(found[name]), flush=True)
        finally:
            load.close(), server.close()
    return found


def main() -> None:
    """Run what was asked for, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", default=["tiny", "smollm2", "open", "health"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "config.json"
        shape.write_text(json.dumps(TINY))
        log = Path(folder) / "server.log"
        tiny = EngineConfig(
            model=str(shape),
            load_format="random",
            device="cpu",
            dtype="float32",
            context_length=2048,
            cache=CacheConfig(memory_bytes=1 << 30),
        )
        found: dict[str, Any] = {"machine": processor()}
        if "tiny" in args.only:
            found["tiny"] = compare(tiny, log, callers=256, max_new=64, rounds=args.rounds)
        if "smollm2" in args.only:
            real = EngineConfig(
                model=str(SMOLLM2),
                device="cpu",
                dtype="float32",
                context_length=2048,
                cache=CacheConfig(memory_bytes=1 << 30),
            )
            found["smollm2"] = compare(real, log, callers=128, max_new=16, rounds=args.rounds)
        if "open" in args.only:
            found["open"] = many_open(tiny, log, count=8192, max_new=8)
        if "health" in args.only:
            found["health"] = health(tiny, log)
    text = json.dumps(found, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
