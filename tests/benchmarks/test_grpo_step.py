"""What the benchmark of a GRPO step does beside looking at the clock."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from recipes.trainers import microbatch
from recipes.types import Problem
from tests.helpers.tiny_models import tiny_hf
from tests.helpers.trajectories import random_batch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


class Noted:
    """A side that notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def step(self) -> dict[str, float]:
        self.turns.append(self.name)
        return {"step": float(len(self.turns))}

    def close(self) -> None:
        pass


def test_the_sides_take_turns_and_each_begins_once() -> None:
    from grpo_step import alternate

    turns: list[str] = []
    rows = alternate({name: Noted(name, turns) for name in "abc"}, 3)
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc"
    # The first turn is not counted.
    assert [row["step"] for row in rows["a"]] == [6.0, 8.0, 10.0]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_padded_rows_have_the_scores_of_the_tree(arch: str) -> None:
    from grpo_padded import score_padded

    model = tiny_hf(arch, vocab_size=20, hidden_size=32, head_dim=8).float().eval()
    trajectories = random_batch(3, 4, vocab=20).trajectories
    with torch.no_grad():
        padded, computed = score_padded(model, trajectories, 0.7)
        model.set_attn_implementation("sdpa")
        tree, nodes = microbatch.score(model, trajectories, 0.7)
    torch.testing.assert_close(padded.logprobs, tree.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.entropy, tree.entropy, atol=1e-5, rtol=1e-5)
    assert computed > nodes


def test_a_coin_grades_by_the_reply_alone() -> None:
    from grpo_sides import Coin

    from recipes.environments.named_tasks import select_environment

    coin = Coin(select_environment("largest"))
    problem: Problem = coin.draw(random.Random(0))
    tosses = [coin.verify(str(number), problem) for number in range(200)]
    assert tosses == [coin.verify(str(number), problem) for number in range(200)]
    assert set(tosses) == {0.0, 1.0} and 60 < sum(tosses) < 140


def test_every_side_is_a_row() -> None:
    from grpo_sides import FIGURES
    from grpo_step import PADDED, PLAIN, TREE, table

    seconds = {name: dict.fromkeys(FIGURES, 2.0) for name in (TREE, PADDED, PLAIN)}
    part = {"replies": "of the task", "seconds": seconds, "ratio": dict.fromkeys(seconds, 0.5)}
    lines = table([part, part]).splitlines()
    assert len(lines) == 8 and len({line.count("|") for line in lines}) == 1
