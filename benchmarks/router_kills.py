"""Part `kills` of `benchmarks/router.py`: kill -9 of one of three workers, in every dialect.

A tiny random model on this processor in float32, three servers behind the router, requests of 13
kinds (`router_kills_calls.py`): n = 4, penalties, stops, lengths, structured output, streams and
whole replies, all dialects. First undisturbed, then with one server and its engine killed once it
has sampled a fifth of what it would. Every reply has to be there and to say the same; of the
sequences that another worker went on with, the figures say how much of what the killed one had
sampled was sampled again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import httpx
from router_kills_calls import NUM_KINDS, call
from router_kills_engine import LOGS, RECORD

from tests.helpers.router_process import router_process, wait_for
from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import TEMPLATE, tiny_tokenizer

NUM_WORKERS = 3
_PATIENCE_S = 540.0
_TOKENS = 12
"""That the one which is killed samples before, for each request: of some 60."""
_SERVE = """
import logging
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from rollout.http import server
from rollout.http.config import ServeConfig
logging.basicConfig(level=logging.WARNING)
logging.getLogger("rollout.http.server").setLevel(logging.INFO)
engine = EngineConfig(
    model=MODEL, dtype="float32", device="cpu", context_length=1024,
    cache=CacheConfig(num_pages=8192, page_size=16),
    scheduler=SchedulerConfig(max_running=128),
)
config = ServeConfig(engine=engine, port=0, router=ROUTER, served_model_name="tiny")
server.serve(config, factory="benchmarks.router_kills_engine:build")
"""


@dataclass
class _Row:
    """Of one sequence on one worker, entered at most a few times: how many tokens were known when
    it entered last, and when each further one was sampled."""

    known: int = 0
    times: list[float] = field(default_factory=list)


def write_model(folder: Path) -> Path:
    """A Llama of two layers with a byte tokenizer and a chat template."""
    write_tiny(folder, "llama", vocab_size=300, max_position_embeddings=2048, eos_token_id=299)
    text = tiny_tokenizer()
    text._backend.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|eos|>", "bos_token": "<|bos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def _fleet(model: Path, logs: Path) -> Iterator[tuple[ServerProcess, list[ServerProcess]]]:
    os.environ[LOGS] = str(logs)
    with ExitStack() as stack:
        router = stack.enter_context(router_process("policy='least_load'"))
        code = _SERVE.replace("MODEL", repr(str(model))).replace("ROUTER", repr(router.url))
        workers = [stack.enter_context(ServerProcess(["-c", code])) for _ in range(NUM_WORKERS)]
        wait_for(router.url, NUM_WORKERS)
        yield router, workers


async def _ask(http: httpx.AsyncClient, number: int) -> Any:
    one = call(number)
    reply = await http.post(one.path, json=one.body)
    if reply.status_code != 200:
        return {"status": reply.status_code, "text": reply.text[:500]}
    return one.same(reply.content)


async def _all(url: str, count: int) -> tuple[dict[int, Any], float]:
    """What came of each request, and the seconds."""
    found: dict[int, Any] = {}
    limits = httpx.Limits(max_connections=None)
    start = time.perf_counter()
    async with httpx.AsyncClient(
        base_url=url, timeout=_PATIENCE_S, limits=limits, trust_env=False
    ) as http:

        async def one(number: int) -> None:
            found[number] = await _ask(http, number)

        await asyncio.gather(*(one(number) for number in range(1, count + 1)))
    return found, time.perf_counter() - start


def _kill(log: Path, num_tokens: int, *pids: int) -> None:
    """kill -9 once an engine has sampled so many more tokens."""
    enough = log.stat().st_size + RECORD.size * num_tokens
    while log.stat().st_size < enough:
        time.sleep(0.002)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _counter(url: str, name: str) -> int:
    for line in httpx.get(f"{url}/metrics", trust_env=False).text.splitlines():
        if line.startswith(f"slipstream_router_{name}_total "):
            return int(float(line.split()[-1]))
    raise KeyError(name)


def _rows(path: Path, since: float) -> dict[int, list[_Row]]:
    """What one engine sampled after a time, by seed: a row for each time that it entered."""
    found: dict[int, list[_Row]] = {}
    data = path.read_bytes()
    for seed, known, when in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
        if when < since:
            continue
        if known >= 0:
            found.setdefault(seed, []).append(_Row(known))
        elif seed in found:
            found[seed][-1].times.append(when)
    return found


def _again(killed: Path, others: list[Path], since: float) -> list[tuple[int, float]]:
    """Of each sequence that another worker went on with: tokens that were sampled again, and the
    seconds over which the killed one had sampled them."""
    lost, found = _rows(killed, since), []
    for path in others:
        for seed, rows in _rows(path, since).items():
            if seed not in lost:
                continue
            last = lost[seed][-1]
            again = last.known + len(last.times) - rows[0].known
            times = last.times[max(len(last.times) - again, 0) :] if again > 0 else []
            found.append((max(again, 0), times[-1] - times[0] if times else 0.0))
    return found


def measure(count: int = 500) -> dict[str, Any]:
    """All of it; `different` counts replies that are missing or say something else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, logs = write_model(folder / "model"), folder / "logs"
        logs.mkdir()
        with _fleet(model, logs) as (router, workers):
            whole, quiet_s = asyncio.run(_all(router.url, count))
            failed = {
                n: told for n, told in whole.items() if isinstance(told, dict) and "text" in told
            }
            assert not failed, list(failed.items())[:3]
            victim = workers[1]
            engines = [int(path.name) for path in logs.iterdir()]
            mine = next(pid for pid in victim.children() if pid in engines)
            since = time.time()

            killing = threading.Thread(
                target=_kill, args=(logs / str(mine), _TOKENS * count, mine, victim.process.pid)
            )
            killing.start()
            found, killed_s = asyncio.run(_all(router.url, count))
            killing.join()
            lost, resumed = _counter(router.url, "lost"), _counter(router.url, "resumed")
        others = [logs / str(pid) for pid in engines if pid != mine]
        again = _again(logs / str(mine), others, since)
    differ = [number for number in whole if found.get(number) != whole[number]]
    spans = sorted(1e3 * seconds for _, seconds in again)
    return {
        "requests": count,
        "kinds": NUM_KINDS,
        "replies": len(found),
        "different": len(differ),
        "first_different": [
            [n, call(n).path, str(whole[n])[:300], str(found.get(n))[:300]] for n in differ[:3]
        ],
        "lost_under": lost,
        "resumed": resumed,
        "sequences_gone_on": len(again),
        "again_tokens_mean": sum(tokens for tokens, _ in again) / max(len(again), 1),
        "again_tokens_most": max((tokens for tokens, _ in again), default=0),
        "again_ms_p50": spans[len(spans) // 2] if spans else 0.0,
        "again_ms_most": spans[-1] if spans else 0.0,
        "undisturbed_s": quiet_s,
        "killed_s": killed_s,
    }
