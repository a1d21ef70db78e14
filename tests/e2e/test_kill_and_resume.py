"""`kill -9` at any moment, then `--resume`: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.char_model import char_model, write_char_model
from tests.helpers.children import ROOT, child_environment
from tests.helpers.recipe_ranks import run_recipe, started_recipe

pytestmark = pytest.mark.slow

STEPS = 14
TIMES = ("timing_s/", "perf/rollout_tokens_per_s", "push/")
DEADLINE_S = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("char_model")
    write_char_model(folder, char_model(hidden=32, layers=1))
    return str(folder)


def flags_of(model: str, *where: str) -> list[str]:
    """For the recipe on a task whose reward a random model sometimes earns."""
    flags = {
        "--model": model,
        "--task": "addition",
        "--steps": str(STEPS),
        "--lr": "1e-3",
        "--dtype": "float32",
        "--checkpoint-every": "3",
        "--eval-every": "5",
        "--eval-prompts": "16",
        "--kv-memory-gb": "0.05",
    }
    return [*(word for pair in flags.items() for word in pair), *where]


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def run(words: list[str], said: Path) -> None:
    done = run_recipe(1, words, said)
    assert done.returncode == 0, done.stderr


def kill_after(lines: int, folder: Path, pid: int, is_alive: Callable[[], bool]) -> None:
    """Kill without warning once so many steps are in the metrics."""
    until = time.monotonic() + DEADLINE_S
    file = folder / "metrics.jsonl"
    while not (file.exists() and len(file.read_text().splitlines()) >= lines):
        assert is_alive(), "the run ended by itself"
        assert time.monotonic() < until, "the run makes no progress"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)


def test_two_kills_change_nothing(model: str, tmp_path: Path) -> None:
    """The first run is the command itself; the processes of the others imported everything
    before."""
    whole, torn, said = tmp_path / "whole", tmp_path / "torn", tmp_path / "said"
    run(flags_of(model, "--out", str(whole)), said)
    command = [sys.executable, "recipes/grpo.py", *flags_of(model, "--out", str(torn))]
    with (
        open(tmp_path / "first", "w") as output,
        subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env=child_environment()
        ) as first,
    ):
        try:
            kill_after(2, torn, first.pid, lambda: first.poll() is None)
        finally:
            first.kill()
    resume = flags_of(model, "--resume", str(torn))
    with started_recipe(1, resume, said) as (second,):
        assert second.pid is not None
        kill_after(8, torn, second.pid, second.is_alive)
    run(resume, said)
    assert [row["step"] for row in metrics(torn)] == list(range(1, STEPS + 1))
    assert metrics(torn) == metrics(whole)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (whole, torn)]
    assert summaries[0]["eval_after"] == summaries[1]["eval_after"]
