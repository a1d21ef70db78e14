"""A run whose replies come from servers behind a router, one of which is killed meanwhile."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import recipes.run.opening
from recipes.grpo import main
from tests.helpers.char_model import CharAddition, char_model, write_char_model
from tests.helpers.router_process import PATIENCE_S, router_process, wait_for
from tests.helpers.serve_process import ServerProcess

pytestmark = pytest.mark.slow

TIMES = ("timing_s/", "perf/rollout_tokens_per_s", "push/")


class SmallSum(CharAddition):
    """Partial credit for a reply that begins with a digit, so that rewards differ at once."""

    def verify(self, reply: str, problem: Any) -> float:
        return float(reply[:1].isdigit())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("char_model")
    write_char_model(folder, char_model(32, 2))
    return str(folder)


def serve(model: str, router: str) -> list[str]:
    words = ["-m", "rollout", "serve", "--model", model, "--port", "0", "--dtype", "float32"]
    return [*words, "--kv-memory", "0.02", "--router", router]


def launched(words: list[str], rank: int, size: int) -> ServerProcess:
    """A server that torchrun, or srun with its variables, starts beside others: it is none of a
    group of processes, whatever they say."""
    with pytest.MonkeyPatch.context() as patch:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": 9}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "SLURM_PROCID": rank}.items():
            patch.setenv(name, str(value))
        return ServerProcess(words)


@contextmanager
def fleet(model: str, count: int) -> Iterator[tuple[ServerProcess, list[ServerProcess]]]:
    with ExitStack() as stack:
        router = stack.enter_context(router_process("policy='least_load'"))
        workers = [
            stack.enter_context(launched(serve(model, router.url), rank, count))
            for rank in range(count)
        ]
        wait_for(router.url, count)
        yield router, workers


def flags(model: str, out: Path, *more: str, steps: int = 2) -> list[str]:
    text = f"--steps {steps} --eval-every 0 --eval-prompts 4 --checkpoint-every 0 --lr 3e-3"
    text += " --prompts-per-step 8 --samples 4 --max-new-tokens 50 --dtype float32"
    return [*text.split(), "--model", model, "--out", str(out), *more]


def rows(out: Path) -> list[dict[str, Any]]:
    """What each step measured, its times aside."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
        for line in lines
    ]


def counter(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics", trust_env=False).text.splitlines():
        if line.startswith(f"slipstream_router_{name}_total "):
            return float(line.split()[-1])
    raise AssertionError(name)


def version_of(worker: ServerProcess) -> int:
    with worker.client() as client:
        return client.state().version


def state_of(url: str, worker: str) -> str:
    """What the router says of a worker that has answered it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for one in httpx.get(f"{url}/workers", trust_env=False).json()["workers"]:
            found = str(one["metadata"]["state"])
            if one["url"] == worker and found != "has not answered yet":
                return found
        time.sleep(0.05)
    raise AssertionError(worker)


def kill_under_load(url: str, victim: ServerProcess) -> None:
    """kill -9 once the victim samples with the weights of a step."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        listed = httpx.get(f"{url}/workers", trust_env=False).json()["workers"]
        mine = next(one for one in listed if one["url"] == victim.url)
        # Version 1 is what the run began with: it is measured, and then trained on.
        if mine["load"] and mine["metadata"]["weight_version"] == "2":
            victim.process.send_signal(signal.SIGKILL)
            return
        time.sleep(0.005)


def test_a_worker_that_is_killed_changes_nothing_of_a_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes.run.opening, "select_environment", lambda *_, **__: SmallSum())
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    # In this process, undisturbed: seeds are the same wherever a reply is sampled.
    assert main(flags(model, whole, "--kv-memory-gb", "0.02")) == 0
    with fleet(model, 2) as (router, workers):
        at = ("--endpoint", router.url)
        killing = threading.Thread(target=kill_under_load, args=(router.url, workers[1]))
        killing.start()
        assert main(flags(model, torn, *at)) == 0
        killing.join()
        assert workers[1].process.poll() == -signal.SIGKILL
        assert counter(router.url, "lost") > 0
        assert version_of(workers[0]) == 3
        with ServerProcess(serve(model, router.url)) as other:
            why = state_of(router.url, other.url)
            assert "has the weights '0', and the fleet serves '3'" in why
            # Another run publishes to both, and counts versions from its own beginning.
            assert main(flags(model, tmp_path / "next", *at, steps=0)) == 0
            assert state_of(router.url, other.url) == "ready"
            assert version_of(workers[0]) == version_of(other) == 4
            assert workers[0].terminate() == 0
            left = httpx.get(f"{router.url}/list_workers", trust_env=False).json()["urls"]
            assert workers[0].url not in left and other.url in left
    assert (torn / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert len(rows(torn)) == 2
    for ours, theirs in zip(rows(torn), rows(whole), strict=True):
        # What was cut is computed again at once, and rounded otherwise.
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
