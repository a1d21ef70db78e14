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

import pytest

import recipes.run.opening
from recipes.environments.base import Environment
from recipes.grpo import main
from tests.helpers.char_model import CharAddition, char_model, write_char_model
from tests.helpers.router_process import router_process, wait_for
from tests.helpers.serve_process import ServerProcess

pytestmark = pytest.mark.slow

TIMES = ("timing_s/", "perf/rollout_tokens_per_s", "push/")


class SmallSum(CharAddition):
    """Partial credit for a reply that begins with a digit, so that rewards differ at once."""

    max_new_tokens = 48

    def verify(self, reply: str, problem: Any) -> float:
        return float(reply[:1].isdigit())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("char_model")
    write_char_model(folder, char_model(32, 2))
    return str(folder)


@contextmanager
def fleet(model: str, count: int) -> Iterator[tuple[ServerProcess, list[ServerProcess]]]:
    with ExitStack() as stack:
        router = stack.enter_context(router_process("policy='least_load'"))
        words = ["-m", "rollout", "serve", "--model", model, "--port", "0", "--dtype", "float32"]
        words += ["--kv-memory", "0.02", "--router", router.url]
        workers = [stack.enter_context(ServerProcess(words)) for _ in range(count)]
        wait_for(router.url, count)
        yield router, workers


def flags(model: str, out: Path, url: str) -> list[str]:
    text = "--steps 2 --eval-every 0 --eval-prompts 4 --checkpoint-every 0 --lr 3e-3"
    text += " --prompts-per-step 8 --samples 4 --dtype float32 --endpoint-patience 60"
    return [*text.split(), "--model", model, "--out", str(out), "--endpoint", url]


def test_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.run.opening, "select_environment", lambda *_, **__: SmallSum())
    with fleet(model, 2) as (router, workers):
        t=time.time()
        assert main(flags(model, tmp_path/"a", router.url)) == 0
        print(time.time()-t)
    print((tmp_path/"a"/"metrics.jsonl").read_text())
