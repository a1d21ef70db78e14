"""What is around the loop of a recipe."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from recipes.grpo import train
from recipes.run.command import run_recipe
from recipes.settings.options import RunOptions
from tests.helpers.char_model import char_model, write_char_model


def test_requests_to_services_are_no_lines_of_the_display(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    assert run_recipe(train, RunOptions(), ["--model", "no/such/model"]) != 0
    assert "no/such/model" in capsys.readouterr().err
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)


@pytest.mark.slow
@pytest.mark.parametrize("reward,called", [("task", "accuracy"), (None, "reward")])
def test_the_mean_of_a_reward_of_ones_own_is_called_a_reward(
    reward: str | None, called: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def score(reply):\n    return -2.5\n")
    write_char_model(tmp_path / "model", char_model(16, 1))
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--steps", "0"]
    words += ["--task", "addition", "--eval-prompts", "2", "--max-new-tokens", "2"]
    words += ["--device", "cpu", "--dtype", "float32", "--kv-memory-gb", "0.01"]
    words += ["--reward", reward or f"{mine}:score", "--eval-set", "sums=addition"]
    words += ["--dashboard", "on" if reward else "auto"]
    with caplog.at_level(logging.INFO):
        assert run_recipe(train, RunOptions(), words) == 0
    value = "0.000" if reward else "-2.500"
    assert f"held-out {called} {value} -> {value} in 0 steps" in caplog.text
    assert f"heldout: {called} {value}" in caplog.text
    assert "sums: accuracy 0.000" in caplog.text
    assert ("dashboard: http://127.0.0.1:" in caplog.text) is (reward is not None)
    assert "the dashboard ended" not in caplog.text
