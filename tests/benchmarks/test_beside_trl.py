"""What the benchmark beside TRL concludes from its rows, and that both sides are told the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.environments.base import problem_at
from recipes.environments.named_tasks import select_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def row(side: str, seed: int, seconds: float, *accuracy: float) -> dict[str, Any]:
    by_step = {str(10 * index): value for index, value in enumerate(accuracy)}
    return {"side": side, "seed": seed, "seconds": seconds, "accuracy": by_step}


@pytest.mark.parametrize(
    "seconds,accuracy,holds",
    [
        (25.0, (0.2, 0.4, 0.6), True),
        (26.0, (0.2, 0.4, 0.6), False),
        (20.0, (0.2, 0.4, 0.75), False),
        (20.0, (0.2, 0.25, 0.6), False),
    ],
)
def test_the_bounds_are_those_of_every_seed_and_step(
    seconds: float, accuracy: tuple[float, ...], holds: bool
) -> None:
    from beside_trl import judge

    good = [row("ours", 0, 10.0, 0.2, 0.4, 0.6), row("trl", 0, 100.0, 0.2, 0.45, 0.6)]
    other = [row("ours", 1, seconds, *accuracy), row("trl", 1, 100.0, 0.2, 0.4, 0.6)]
    assert judge([*good, *other])["holds"] == holds
    assert judge(good)["difference"]["0"]["10"] == pytest.approx(-0.05)
    assert not judge(good[:1])["holds"] and judge(good[:1])["ratio"] == {}


def test_rows_of_several_files_make_one_table(tmp_path: Path) -> None:
    from beside_trl import read, table, write

    write(str(tmp_path / "a.json"), [row("ours", 0, 10.0, 0.2, 0.4)])
    write(str(tmp_path / "b.json"), [row("trl", 0, 50.0, 0.2, 0.5)])
    rows = read(str(tmp_path / "a.json")) + read(str(tmp_path / "b.json"))
    told = table(rows)
    assert "| ours | 0 | 0.200 | 0.400 | 10.0 |" in told
    assert "10: -0.100; seconds ours / TRL's 0.200" in told
    assert json.loads((tmp_path / "a.json").read_text())["verdict"]["holds"] is False


def test_the_clock_leaves_evaluations_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import beside_trl_sides

    moments = iter((100.0, 101.0, 111.0, 113.0))
    monkeypatch.setattr(beside_trl_sides.time, "perf_counter", lambda: next(moments))
    clock = beside_trl_sides.Clock()
    with clock.running(), clock.stopped():
        pass
    assert clock.seconds == 3.0


class Words:
    """A tokenizer of words, as ours and as transformers'."""

    chat_template = "there is one"

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def encode(self, text: str) -> list[int]:
        return [len(word) + self.shift for word in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(str(each) for each in ids)

    def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
        return [each for message in messages for each in self.encode(message["content"])]


def test_prompts_with_other_tokens_are_refused() -> None:
    from beside_trl_sides import prompt_of

    from recipes.collecting.prompts import Prompts

    environment = select_environment("largest")
    problem = problem_at(environment, "train", 0, 0)
    prompts = Prompts(environment, Words(), (0,))
    assert prompt_of(prompts, Words(), problem) == environment.messages(problem)
    with pytest.raises(ValueError, match="other tokens"):
        prompt_of(prompts, Words(shift=1), problem)


def test_trl_is_told_the_numbers_of_the_recipe(tmp_path: Path) -> None:
    from beside_trl_sides import Judge, Work

    work = Work(
        model="m",
        task="largest",
        dtype="float32",
        steps=30,
        eval_every=10,
        eval_prompts=8,
        prompts=4,
        samples=2,
        lr=2e-5,
        temperature=0.7,
        rows=4,
        seed=3,
    )
    options = work.options(tmp_path)
    assert (options.steps, options.seed, options.eval_every) == (30, 3, 10)
    assert (options.optimizer.lr, options.rollout.temperature) == (2e-5, 0.7)
    assert options.objective.algorithm == "grpo"
    environment = select_environment("largest")
    problems = [problem_at(environment, "train", 3, index) for index in range(2)]

    class Decoded:
        def reply_text(self, ids: Any) -> str:
            assert isinstance(ids, np.ndarray)
            return problems[int(ids[0])].answer

    judge = Judge(environment=environment, prompts=Decoded(), actor=None, heldout=[], eval_every=1)  # type: ignore[arg-type]
    verify = judge.reward(problems)
    assert verify(completion_ids=[[0], [0], [1]], index=[0, 1, 1], prompts=[]) == [
        1.0,
        float(problems[0].answer == problems[1].answer),
        1.0,
    ]
