"""The zero-shot tasks: right answers, nothing to copy, enough of both splits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.environments.base import split_of
from recipes.environments.file_task import load_task

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("numerals", "word_sums")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_numbers_are_spelled_as_people_do() -> None:
    from zero_shot_tasks import spelled

    assert [spelled(number) for number in (0, 13, 20, 47, 100, 305, 999)] == [
        "zero", "thirteen", "twenty", "forty-seven", "one hundred",
        "three hundred and five", "nine hundred and ninety-nine",
    ]  # fmt: skip
    assert len({spelled(number) for number in range(1000)}) == 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_cannot_be_copied(name: str, tmp_path: Path) -> None:
    from zero_shot_tasks import TASKS

    rows = TASKS[name]()
    assert all(not re.search(r"\d", row["prompt"]) for row in rows)
    assert all(re.fullmatch(r"\d+", str(row["answer"])) for row in rows)
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts) > 300
    heldout = [prompt for prompt in prompts if split_of(prompt, 8) == "heldout"]
    assert len(heldout) >= 30
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(path)
    assert (task.count("train"), task.count("heldout")) == (len(rows) - len(heldout), len(heldout))


def test_sums_are_right() -> None:
    from zero_shot_tasks import spelled, word_sums

    numbers = {spelled(number): number for number in range(30)}
    for row in word_sums():
        words = re.search(r"is (\S+) plus (\S+)\?", row["prompt"])
        assert words is not None
        assert row["answer"] == numbers[words[1]] + numbers[words[2]]
