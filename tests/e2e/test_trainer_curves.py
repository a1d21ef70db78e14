"""Every trainer learns alike from a bfloat16 checkpoint, and dithered masters are why it learns.

Held-out accuracy of the default task over STEPS steps and three seeds for each trainer, as
`benchmarks/grpo_seeds.py` takes it. Runs part by the rounding of their sums and then by what they
sample, so a trainer is compared by the range of its seeds, never by one curve.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEFAULT_MODEL
from tests.helpers.children import ROOT, child_environment

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 30
EVERY = 10
PLAIN = "--dither on"
UNDITHERED = "--dither off"
OTHERS = (
    "--trainer fsdp --dither on",
    "--trainer deepspeed --zero 1 --dither on",
    "--trainer deepspeed --zero 2 --dither on",
)
# An accuracy over 256 problems has a standard error of 0.03 where half are right.
SAMPLING_ERROR = 0.06


@pytest.fixture(scope="module")
def grid_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as a bfloat16 folder: its weights lie on the grid."""
    if not DEFAULT_MODEL.is_file():
        pytest.skip("the default model is not on this machine")
    out = tmp_path_factory.mktemp("grid") / "run"
    words = ["--steps", "1", "--lr", "1e-15", "--dither", "off", "--eval-prompts", "8"]
    words += ["--eval-every", "0", "--checkpoint-every", "0", "--out", str(out)]
    _run("recipes/grpo.py", "--model", str(DEFAULT_MODEL), *words)
    return out / "model"


@pytest.fixture(scope="module")
def curves(
    grid_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[float]]]:
    """Accuracies at each evaluation by setting: one list a seed."""
    pytest.importorskip("deepspeed", exc_type=ImportError)
    found = tmp_path_factory.mktemp("curves") / "curves.json"
    settings = "|".join([PLAIN, UNDITHERED, *OTHERS])
    words = ["--seeds", "0-2", "--at-once", "6", "--json", str(found), f"--settings= {settings}"]
    flags = ["--steps", str(STEPS), "--eval-every", str(EVERY), "--model", str(grid_checkpoint)]
    _run("benchmarks/grpo_seeds.py", *words, "--", *flags)
    by_setting: dict[str, list[list[float]]] = {}
    for run in json.loads(found.read_text())["runs"]:
        assert not run["failed"], run
        by_setting.setdefault(run["setting"], []).append(run["accuracies"])
    return by_setting


@pytest.mark.parametrize("trainer", OTHERS)
def test_a_trainer_learns_within_the_spread_of_the_plain_one(
    curves: dict[str, list[list[float]]], trainer: str
) -> None:
    for step, (ours, plain) in enumerate(
        zip(zip(*curves[trainer], strict=True), zip(*curves[PLAIN], strict=True), strict=True)
    ):
        assert max(ours) >= min(plain) - SAMPLING_ERROR, (step * EVERY, ours, plain)
        assert min(ours) <= max(plain) + SAMPLING_ERROR, (step * EVERY, ours, plain)
    assert min(run[-1] for run in curves[trainer]) >= 0.6


def test_dithered_masters_learn_sooner_than_those_on_the_grid(
    curves: dict[str, list[list[float]]],
) -> None:
    # The first steps are where masters in the middle of their cells show nothing.
    after_ten = {setting: [run[1] for run in runs] for setting, runs in curves.items()}
    assert min(after_ten[PLAIN]) > max(after_ten[UNDITHERED]) + SAMPLING_ERROR
    # Dithering changes nothing of what is served before the first step.
    assert {run[0] for run in curves[PLAIN]} == {run[0] for run in curves[UNDITHERED]}


def _run(script: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, script, *words],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
