"""A task from a data set of one's own: what is trained on and what is held out."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.data.data_options import DataOptions
from recipes.environments.base import OwnSplits, heldout_problems, problem_at, split_of
from recipes.environments.file_task import FileTask, load_task


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(first: int, num: int) -> list[dict[str, Any]]:
    return [{"question": f"{i}+1=", "answer": i + 1} for i in range(first, first + num)]


def keys(task: FileTask, split: Any) -> set[str]:
    return {task.at(split, i).key for i in range(task.count(split))}


@pytest.mark.parametrize("share,one_in", [(None, 8), ("1/4", 4), ("0.05", 20)])
def test_a_share_is_held_out_by_the_hash_of_the_prompt(
    tmp_path: Path, share: str | None, one_in: int
) -> None:
    path = write(tmp_path / "t.jsonl", sums(0, 200) * 2)
    task = load_task(path, DataOptions(heldout=share))
    assert isinstance(task, OwnSplits)
    for split in ("train", "heldout"):
        assert all(split_of(key, one_in) == split for key in keys(task, split))
    assert keys(task, "train") | keys(task, "heldout") == {f"{i}+1=" for i in range(200)}
    assert task.count("train") + task.count("heldout") == 400
    assert len(heldout_problems(task, 1000)) == len(keys(task, "heldout"))
    assert heldout_problems(task, 3) == heldout_problems(task, 1000)[:3]


def test_draws_are_of_the_split_and_of_the_seed_alone(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "t.jsonl", sums(0, 50)))
    drawn = [problem_at(task, "train", 0, i) for i in range(300)]
    assert {p.key for p in drawn} == keys(task, "train")
    assert drawn[:9] == [problem_at(task, "train", 0, i) for i in range(9)]
    assert drawn[:9] != [problem_at(task, "train", 1, i) for i in range(9)]
    both = {task.draw(random.Random(i)).key for i in range(600)}
    assert both == keys(task, "train") | keys(task, "heldout")


def test_a_second_file_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "t.jsonl", sums(0, 20))
    other = write(tmp_path / "h.jsonl", sums(18, 5))
    with caplog.at_level(logging.WARNING):
        task = load_task(path, DataOptions(heldout=str(other)))
    assert keys(task, "heldout") == {f"{i}+1=" for i in range(18, 23)}
    assert keys(task, "train") == {f"{i}+1=" for i in range(18)}
    assert "2 of 20 rows have prompts that are held out" in caplog.text


def test_a_split_of_the_folder_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "d" / "train.jsonl", sums(0, 20))
    write(tmp_path / "d" / "test.jsonl", sums(50, 5))
    task = load_task(tmp_path / "d", DataOptions(heldout="test"))
    assert (task.name, task.count("train"), task.count("heldout")) == ("d", 20, 5)
    task = load_task(tmp_path / "d", DataOptions(train_split="test", heldout="train"))
    assert (task.count("train"), task.count("heldout")) == (5, 20)
    assert str(task.place("train", 4)) == f"{tmp_path}/d/test.jsonl:5"


@pytest.mark.parametrize(
    "heldout,told",
    [
        ("train", "is the split that is trained on"),
        ("val", r"'val' is no split of .*test, train.*no file or folder, and no share"),
        ("3/10", "no share of one in N"),
        ("0.3", "no share of one in N"),
        ("1/0", "no share of one in N"),
        ("1", "no share of one in N"),
        ("{folder}", "has the splits test, train; give the file"),
    ],
)
def test_what_cannot_be_held_out(tmp_path: Path, heldout: str, told: str) -> None:
    for name in ("train", "test"):
        write(tmp_path / "d" / f"{name}.jsonl", sums(0, 20))
    options = DataOptions(heldout=heldout.replace("{folder}", str(tmp_path / "d")))
    with pytest.raises(InvalidRequest, match=told) as caught:
        load_task(tmp_path / "d", options)
    assert caught.value.field == "heldout"


def test_chats_and_other_columns_reach_prompt_and_reward(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2="}]
    row = {"prompt": chat, "reward_model": {"ground_truth": "4"}, "data_source": "sums"}
    options = DataOptions(answer_column="reward_model.ground_truth")
    task = load_task(write(tmp_path / "t.jsonl", [row]), options)
    problem = task.draw(random.Random(0))
    assert task.messages(problem) == chat
    assert task.grading("It is 4", problem) == ("It is 4", "4")
    assert problem.columns == {k: row[k] for k in ("reward_model", "data_source")}
    assert task.verify("4", problem) == 1.0


def test_a_task_without_some_of_its_problems(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "t.jsonl", sums(0, 50)))
    first = task.at("train", 0).key
    less = task.without({"train": [0], "heldout": range(task.count("heldout"))})
    assert keys(less, "train") == keys(task, "train") - {first}
    assert (less.num_different("train"), less.num_different("heldout")) == (
        task.num_different("train") - 1,
        0,
    )
    with pytest.raises(InvalidRequest, match="has no heldout problem"):
        problem_at(less, "heldout", 0, 0)
