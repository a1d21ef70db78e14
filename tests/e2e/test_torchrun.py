"""The recipe under torchrun: colocated, disaggregated, asleep, resumed; all learn the same.

The runs divide a batch differently, so their gradients differ by the rounding of float32 sums. Adam
alone would make more of that: its first step is the sign of a gradient, however small, and a
gradient of zero but for rounding moves a weight by the whole learning rate, in a direction that
depends on the processor. So these runs clip gradients to MAX_GRAD_NORM, where Adam's epsilon
counts: a step is then at most lr / epsilon times the gradient, and what is rounding in a gradient
stays rounding in the weights.

Two runs are torchrun's own; the processes of the others are told what torchrun tells its own, but
are forked from one that has imported everything.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.char_model import char_model, write_char_model
from tests.helpers.children import ROOT, child_environment
from tests.helpers.recipe_ranks import run_recipe

DEADLINE_S = 240
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
STEPS = 3
LR = 1e-2
ADAM_EPSILON = 1e-8
MAX_GRAD_NORM = 1e-6
# Of the gradient's norm, how far two orders of its sums may part. Sums over a few thousand terms in
# float32 (unit roundoff 6e-8) part by some 1e-6.
ROUNDING = 1e-5
# m / (sqrt(v) + epsilon) changes by at most 2 / epsilon times what a gradient changes by.
WEIGHT_BOUND = STEPS * LR * 2 / ADAM_EPSILON * ROUNDING * MAX_GRAD_NORM
# Times, and what depends on how the rows were cut into micro-batches.
NOT_COMPARED = ("timing_s/", "push/", "perf/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model, and a task of one character that a random model often guesses."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_char_model(folder / "model", char_model(hidden=32, layers=2))
    pairs = [(a, b) for a in range(10) for b in range(10)]
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": (a + b) % 10}) for a, b in pairs]
    (folder / "task.jsonl").write_text("\n".join(lines))
    # GPU kernels want heads of a usual size.
    write_char_model(folder / "model-gpu", char_model(hidden=256, layers=2))
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """The run of one process with the plain trainer, which the others are compared with."""
    out = folder / "plain"
    done = run_recipe(1, flags(folder, out), folder / "plain-said")
    assert done.returncode == 0, done.stderr
    assert any(row["grad_norm"] > 0 for row in rows(out)), "nothing was learned"
    # Else equal weights would say nothing.
    assert moved(out, folder) > 100 * WEIGHT_BOUND
    return out


def flags(folder: Path, out: Path, *, device: str = "cpu", model: str = "model") -> list[str]:
    text = f"--steps {STEPS} --lr {LR} --max-new-tokens 1 --prompts-per-step 7 --samples 8"
    text += f" --dtype float32 --device {device} --kv-memory-gb 0.05"
    text += " --eval-every 2 --eval-prompts 5 --checkpoint-every 2"
    if device == "cpu":
        text += f" --max-grad-norm {MAX_GRAD_NORM}"
    paths = ["--model", str(folder / model), "--task", str(folder / "task.jsonl")]
    return [*text.split(), *paths, "--out", str(out)]


def torchrun(num: int, *words: str) -> subprocess.CompletedProcess[str]:
    """torchrun itself, to the end."""
    command = [*TORCHRUN, "--nproc-per-node", str(num), "recipes/grpo.py", *words]
    with started(command) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; whatever is left of that at the end is killed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not done():
        assert process.poll() is None, f"it ended by itself with {process.returncode}"
        assert time.monotonic() < until, "it makes no progress"
        time.sleep(0.05)


def run(folder: Path, name: str, num: int, *words: str) -> Path:
    out = folder / name
    done = run_recipe(num, [*flags(folder, out), *words], folder / f"{name}-said")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(out: Path, reference: Path) -> None:
    """Every figure of every step, and the final weights: see the head of this file."""
    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(rows(out), rows(reference), strict=True):
        # The mismatch of engine and trainer is rounding alone: bounded, not equal.
        rounding = [key for key in theirs if key.startswith(("sampling/", "rollout_corr/"))]
        assert ours["sampling/sampling_logp_difference/max"] < 1e-4
        compared = [k for k in theirs if not k.startswith(NOT_COMPARED) and k not in rounding]
        assert ours.keys() >= set(compared)
        want = {key: theirs[key] for key in compared}
        assert {key: ours[key] for key in compared} == pytest.approx(want, rel=1e-3, abs=1e-5)
    got, want = (load_file(path / "model" / "model.safetensors") for path in (out, reference))
    assert got.keys() == want.keys()
    apart = {name: float((got[name] - want[name]).norm()) for name in want}
    assert math.hypot(*apart.values()) < WEIGHT_BOUND, apart


def moved(out: Path, folder: Path) -> float:
    """Norm of what a run changed."""
    before, after = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(out / "model" / "model.safetensors"),
    )
    return math.hypot(*(float((after[name] - before[name]).norm()) for name in before))


@pytest.mark.slow
def test_two_fsdp_processes_asleep_while_training(folder: Path, reference: Path) -> None:
    out = folder / "fsdp2"
    done = torchrun(2, *flags(folder, out), "--trainer", "fsdp", "--sleep", "True")
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(out, reference)
    assert max(row["timing_s/sleep"] for row in rows(out)) > 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["trainer"], summary["trainer_processes"]) == ("fsdp", 2)


@pytest.mark.parametrize(
    "num,stage",
    [
        pytest.param(2, 3, marks=pytest.mark.slow),
        pytest.param(1, 3, marks=pytest.mark.long),
        pytest.param(2, 1, marks=pytest.mark.long),
    ],
)
def test_colocated_deepspeed(folder: Path, reference: Path, num: int, stage: int) -> None:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    words = ("--trainer", "deepspeed", "--zero", str(stage))
    assert_same_run(run(folder, f"zero{stage}-{num}", num, *words), reference)


@pytest.mark.slow
def test_two_trainers_send_their_shards_to_two_engines(folder: Path, reference: Path) -> None:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    words = ("--trainer", "deepspeed", "--zero", "3", "--rollout-gpus", "2")
    assert_same_run(run(folder, "sharded", 2, *words), reference)


@pytest.mark.slow
def test_one_trainer_broadcasts_to_an_engine(folder: Path, reference: Path) -> None:
    assert_same_run(run(folder, "broadcast", 1, "--rollout-gpus", "1"), reference)


@pytest.mark.long
def test_a_resumed_run_ends_like_an_unbroken_one(folder: Path, reference: Path) -> None:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    words = ("--trainer", "deepspeed", "--zero", "3", "--steps", "2")
    out = run(folder, "resumed", 2, *words)
    resume = ["--resume", str(out), "--steps", str(STEPS)]
    refused = run_recipe(1, resume, folder / "refused-said")
    assert refused.returncode != 0 and "--nproc-per-node 2" in refused.stderr
    done = run_recipe(2, resume, folder / "resumed-said")
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(out, reference)


@pytest.mark.slow
def test_a_killed_process_ends_the_run(folder: Path) -> None:
    out = folder / "killed"
    words = [*flags(folder, out), "--trainer", "fsdp", "--steps", "100000"]
    with started([*TORCHRUN, "--nproc-per-node", "2", "recipes/grpo.py", *words]) as process:
        wait_for(lambda: (out / "metrics.jsonl").exists(), process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(60) != 0
        for child in children:
            assert not Path(f"/proc/{child}").exists(), "a process was left behind"


@pytest.mark.slow
def test_the_plain_trainer_is_one_process(folder: Path) -> None:
    done = run_recipe(2, flags(folder, folder / "none"), folder / "none-said")
    assert done.returncode != 0
    assert "InvalidRequest (trainer): trainer: plain is one process" in done.stderr


def run_on_gpu(folder: Path, name: str, num: int, *words: str) -> list[dict[str, Any]]:
    """Rows of a run on GPUs in bfloat16, whose weights reached the engine."""
    out = folder / name
    given = flags(folder, out, device="cuda", model="model-gpu")
    done = torchrun(num, *given, "--dtype", "bfloat16", "--lr", "1e-4", *words)
    assert done.returncode == 0, done.stderr[-4000:]
    measured = rows(out)
    assert [row["weight_version"] for row in measured] == list(range(1, STEPS + 1))
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.05 for row in measured)
    assert any(row["grad_norm"] > 0 for row in measured)
    return measured


@pytest.mark.gpu
@pytest.mark.parametrize("words", [("fsdp",), ("deepspeed", "--zero", "3")])
def test_one_gpu(folder: Path, words: tuple[str, ...]) -> None:
    pytest.importorskip(words[0] if words[0] == "deepspeed" else "torch", exc_type=ImportError)
    pytest.importorskip("torch_memory_saver", exc_type=ImportError)
    measured = run_on_gpu(folder, f"gpu-{words[0]}", 1, "--trainer", *words)
    assert max(row["timing_s/sleep"] for row in measured) > 1e-4


@pytest.mark.multi_gpu
@pytest.mark.parametrize("trainer", ["fsdp", "deepspeed"])
def test_two_gpus_colocated(folder: Path, trainer: str) -> None:
    if trainer == "deepspeed":
        pytest.importorskip("deepspeed", exc_type=ImportError)
    run_on_gpu(folder, f"two-{trainer}", 2, "--trainer", trainer)


@pytest.mark.multi_gpu
def test_the_last_gpu_rolls_out(folder: Path) -> None:
    run_on_gpu(folder, "last", 1, "--trainer", "fsdp", "--rollout-gpus", "1")
