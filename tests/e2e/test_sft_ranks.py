"""Supervised runs over several processes: sharded trainers take the steps of the plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.sft import main
from tests.helpers.char_model import char_model, write_char_model
from tests.helpers.recipe_ranks import run_recipe

pytestmark = pytest.mark.slow

STEPS = 3
# As in test_torchrun.py: clipped so far that Adam's epsilon counts, rounding stays rounding.
FLAGS = (
    f"--steps {STEPS} --batch-size 10 --lr 1e-2 --max-grad-norm 1e-6 --dtype float32 --device cpu "
    "--kv-memory-gb 0.05 --eval-every 2 --eval-prompts 5 --max-new-tokens 3 --checkpoint-every 0"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    write_char_model(folder / "model", char_model(hidden=32, layers=2))
    pairs = [(a, b) for a in range(10) for b in range(10)]
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in pairs]
    (folder / "task.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, num: int, name: str, *words: str) -> list[dict[str, Any]]:
    """The rows of the steps, and the last held-out loss."""
    task = str(folder / "task.jsonl")
    paths = ["--model", str(folder / "model"), "--task", task, "--eval-task", task]
    out = folder / name
    done = run_recipe(
        num,
        [*FLAGS.split(), *paths, "--out", str(out), *words],
        folder / f"{name}-said",
        main=main,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert (len(rows), summary["trainer_processes"]) == (STEPS, num)
    timed = ("timing_s/", "perf/trainer")
    kept = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
    return [*kept, {"eval/loss": summary["eval_loss_after"]}]


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[dict[str, Any]]:
    rows = run(folder, 1, "plain")
    assert rows[0]["grad_norm"] > 0
    return rows


@pytest.mark.parametrize("words", ["--trainer fsdp", "--trainer deepspeed --zero 3"])
def test_two_processes_take_the_steps_of_one(
    folder: Path, reference: list[dict[str, Any]], words: str
) -> None:
    if "deepspeed" in words:
        pytest.importorskip("deepspeed", exc_type=ImportError)
    rows = run(folder, 2, words.split()[1], *words.split())
    for ours, theirs in zip(rows, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
