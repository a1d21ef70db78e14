"""PPO on two processes is PPO on one, with a critic on the policy's network or on one of its own,
and goes on from its checkpoint.

Gradients are clipped so far that Adam's epsilon counts, as in test_torchrun.py: rounding in a
gradient stays rounding in the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes import ppo
from tests.helpers.char_model import char_model, write_char_model
from tests.helpers.recipe_ranks import run_recipe

pytestmark = pytest.mark.slow

STEPS = 4
NOT_COMPARED = ("timing_s/", "push/", "perf/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model, and a task of one character that a random model often guesses."""
    folder = tmp_path_factory.mktemp("ppo")
    write_char_model(folder / "model", char_model(hidden=32, layers=2))
    pairs = [(a, b) for a in range(10) for b in range(10)]
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": (a + b) % 10}) for a, b in pairs]
    (folder / "task.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, name: str, num: int, words: str, steps: int = STEPS) -> list[dict[str, Any]]:
    """The rows of a run, begun or gone on with."""
    out = folder / name
    flags = f"--steps {steps} "
    if (out / "config.json").exists():
        flags += f"--resume {out}"
    else:
        flags += f"--model {folder / 'model'} --task {folder / 'task.jsonl'} --out {out} {words}"
        flags += " --lr 1e-2 --max-grad-norm 1e-6 --max-new-tokens 2 --prompts-per-step 24"
        flags += " --num-iterations 2 --critic-warmup-steps 1 --kl-coef 0.1 --dtype float32"
        flags += (
            " --device cpu --kv-memory-gb 0.05 --eval-every 0 --eval-prompts 5 --checkpoint-every 2"
        )
    done = run_recipe(num, flags.split(), folder / f"{name}-said", main=ppo.main)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of one process with the plain trainer, by critic."""
    return {
        critic: run(folder, f"plain-{critic}", 1, f"--critic {critic}")
        for critic in ("shared", "own")
    }


def compared(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(NOT_COMPARED)}


@pytest.mark.parametrize(
    ("trainer", "critic"),
    [
        ("fsdp", "shared"),
        ("deepspeed --zero 3", "own"),
        pytest.param("fsdp", "own", marks=pytest.mark.long),
        pytest.param("deepspeed --zero 3", "shared", marks=pytest.mark.long),
    ],
)
def test_two_processes_learn_what_one_does_and_go_on(
    folder: Path, alone: dict[str, list[dict[str, Any]]], critic: str, trainer: str
) -> None:
    if trainer.startswith("deepspeed"):
        pytest.importorskip("deepspeed", exc_type=ImportError)
    name = f"{trainer.split()[0]}-{critic}"
    run(folder, name, 2, f"--trainer {trainer} --critic {critic}", steps=2)
    got = run(folder, name, 2, "")
    assert len(got) == len(alone[critic]) == STEPS
    assert any(row["grad_norm"] > 0 for row in got)
    assert got[-1]["critic/vpred_mean"] != 0
    for ours, theirs in zip(got, alone[critic], strict=True):
        assert compared(ours) == pytest.approx(compared(theirs), rel=2e-3, abs=1e-5)
