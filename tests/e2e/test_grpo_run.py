"""The recipe over the real engine with a tiny model: from flags to folder, killed and resumed."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import recipes.run.opening
from recipes.environments.base import Environment
from recipes.grpo import main
from recipes.trainers.plain import Trainer
from tests.helpers.char_model import CharAddition, char_model, write_char_model

pytestmark = pytest.mark.slow


class SmallSum(CharAddition):
    """Partial credit for a reply that begins with a digit, so that rewards differ at once."""

    def verify(self, reply: str, problem: Any) -> float:
        return float(reply[:1].isdigit())


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def environment(task: str, *_: object, **__: object) -> Environment:
        return SmallSum()

    monkeypatch.setattr(recipes.run.opening, "select_environment", environment)
    folder = tmp_path / "model"
    write_char_model(folder, char_model(32, 2))
    return str(folder)


def flags(model: str, out: Path) -> list[str]:
    text = "--steps 6 --eval-every 2 --eval-prompts 8 --checkpoint-every 3 --lr 3e-3"
    text += " --prompts-per-step 4 --samples 4 --kv-memory-gb 0.02 --dtype float32"
    return [*text.split(), "--model", model, "--out", str(out)]


def rows(out: Path) -> list[dict[str, Any]]:
    timed = ("timing_s/", "perf/rollout_tokens_per_s", "push/")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(timed)}
        for line in lines
    ]


def test_a_run_leaves_a_complete_folder(model: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(flags(model, out)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["device"], summary["dtype"]) == (6, "cpu", "float32")
    assert [row["weight_version"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows(out)) < 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    assert loaded.num_parameters() == char_model(32, 2).num_parameters()


def test_killed_and_resumed_equals_unbroken(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert main(flags(model, unbroken)) == 0
    step, steps = Trainer.step, 0

    def dying_step(self: Trainer, lr: float) -> float:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return step(self, lr)

    monkeypatch.setattr(Trainer, "step", dying_step)
    assert main(flags(model, killed)) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"interrupted; continue after step 3 with --resume {killed}"
    monkeypatch.setattr(Trainer, "step", step)
    assert main(["--resume", str(killed)]) == 0
    assert rows(killed) == rows(unbroken)


def test_a_full_disk_ends_in_one_line_that_says_how_to_go_on(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    save, saves = Trainer.save, 0

    def full(self: Trainer, folder: Path) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(Trainer, "save", full)
    assert main(flags(model, out)) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("DiskFull") and str(out / "checkpoints" / "step_000006") in told
    assert "bytes are free" in told
    assert told.endswith(f"continue after step 3 with --resume {out}")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000003"]
    monkeypatch.setattr(Trainer, "save", save)
    assert main(["--resume", str(out)]) == 0


def test_what_nobody_expected_keeps_its_traceback(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(self: Trainer, lr: float) -> float:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(Trainer, "step", mistake)
    with pytest.raises(KeyError, match="mistake of ours"):
        main(flags(model, tmp_path / "run"))
