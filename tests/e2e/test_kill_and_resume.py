"""`kill -9` at any moment, then `--resume`: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.char_model import char_model, write_char_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 14
TIMES = ("timing_s/", "perf/rollout_tokens_per_s", "push/")
DEADLINE_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("char_model")
    write_char_model(folder, char_model(hidden=32, layers=1))
    return str(folder)


def command(model: str, *where: str) -> list[str]:
    """The recipe on a task whose reward a random model sometimes earns."""
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
    words = [word for pair in flags.items() for word in pair]
    return [sys.executable, "recipes/grpo.py", *words, *where]


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def run(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )
    assert done.returncode == 0, done.stderr


def kill_after(lines: int, folder: Path, *words: str) -> None:
    """Start, and kill without warning once so many steps are in the metrics."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    until = time.monotonic() + DEADLINE_S
    file = folder / "metrics.jsonl"
    while not (file.exists() and len(file.read_text().splitlines()) >= lines):
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < until, "the run makes no progress"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_two_kills_change_nothing(model: str, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(*command(model, "--out", str(whole)))
    kill_after(2, torn, *command(model, "--out", str(torn)))
    kill_after(8, torn, *command(model, "--resume", str(torn)))
    run(*command(model, "--resume", str(torn)))
    assert [row["step"] for row in metrics(torn)] == list(range(1, STEPS + 1))
    assert metrics(torn) == metrics(whole)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (whole, torn)]
    assert summaries[0]["eval_after"] == summaries[1]["eval_after"]
