"""Sets of problems by name: which problems they hold, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ContextTooLong, InvalidRequest
from recipes.data.data_options import DataOptions
from recipes.environments.base import Environment, heldout_problems, split_of
from recipes.environments.named_tasks import select_environment
from recipes.evaluation.eval_sets import CheckedSet, graded_as_run, read_sets
from recipes.rewards.reward_options import RewardOptions
from tests.helpers.char_model import char_tokenizer

PROMPTS = [f"{a}+{b}=" for a in range(10, 15) for b in range(10, 18)]


def write(path: Path, prompts: list[str]) -> str:
    lines = [json.dumps({"prompt": prompt, "answer": 1}) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read(*words: str, trained: Environment | None = None, **changes: Any) -> list[CheckedSet]:
    given = {"context_length": 4096, "num_problems": 100, "skip_long": False, **changes}
    data = given.pop("data", DataOptions())
    return read_sets(words, data, char_tokenizer(), trained=trained, **given)


def questions(checked: CheckedSet) -> set[str]:
    return {problem.question for problem in checked.eval_set.problems}


def test_a_file_is_taken_whole_and_a_generated_task_by_its_held_out_problems(
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "sums.jsonl", PROMPTS)
    sums, largest = read(f"sums={file}", "big=largest")
    assert [each.eval_set.name for each in (sums, largest)] == ["sums", "big"]
    assert questions(sums) == set(PROMPTS)
    task = select_environment("largest")
    assert list(largest.eval_set.problems) == heldout_problems(task, 100)
    assert all(split_of(p.key, task.heldout_one_in) == "heldout" for p in largest.eval_set.problems)
    assert len(read(f"sums={file}", num_problems=7)[0].eval_set.problems) == 7


def test_of_the_file_that_is_trained_on_only_the_held_out_problems_are_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "sums.jsonl", PROMPTS)
    trained = select_environment(file)
    (same,) = read(f"same={tmp_path}/../{tmp_path.name}/sums.jsonl", trained=trained)
    assert questions(same) == {p for p in PROMPTS if split_of(p, 8) == "heldout"}
    assert not caplog.records
    copy = write(tmp_path / "copy.jsonl", [*PROMPTS, "99+99="])
    with caplog.at_level(logging.WARNING):
        (other,) = read(f"other={copy}", trained=trained)
    num_trained = len(PROMPTS) - len(questions(same))
    assert f"{num_trained} of the {len(PROMPTS) + 1} problems of other are trained on" in (
        caplog.text
    )
    assert len(other.eval_set.problems) == len(PROMPTS) + 1


def test_of_a_folder_with_splits_the_test_split_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PROMPTS[:30])
    trained = select_environment(str(tmp_path / "train.jsonl"))
    write(tmp_path / "test.jsonl", PROMPTS[28:])
    assert questions(read(f"t={tmp_path}", trained=trained)[0]) == set(PROMPTS[28:])
    trained = select_environment(str(tmp_path))
    seen = {trained.at("train", i).question for i in range(trained.count("train"))}
    (checked,) = read(f"t={tmp_path}", trained=trained)
    assert seen & set(PROMPTS[28:]) and questions(checked) == set(PROMPTS[28:]) - seen
    (tmp_path / "test.jsonl").rename(tmp_path / "validation.jsonl")
    with pytest.raises(InvalidRequest, match=r"has the splits train, validation.*give the file"):
        read(f"t={tmp_path}")


def test_the_columns_of_the_task_say_nothing_to_a_generated_set(tmp_path: Path) -> None:
    trained = select_environment(write(tmp_path / "t.jsonl", PROMPTS))
    data = DataOptions(prompt_column="q", answer_pattern="#### (.+)", train_split="train")
    (checked,) = read_sets(
        ("sums=addition",),
        data,
        char_tokenizer(),
        trained=trained,
        context_length=4096,
        num_problems=5,
    )
    assert len(checked.eval_set.problems) == 5


@pytest.mark.parametrize("task", ["nothing", "missing.jsonl", "gym:no_such_task"])
def test_a_task_that_is_none_is_an_error_of_the_flag(task: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^eval_set: one: ") as caught:
        read(f"one={task}")
    assert caught.value.field == "eval_set"


def test_prompts_that_do_not_fit_are_refused_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "sums.jsonl", ["1+1=", "123+456="])
    with pytest.raises(
        ContextTooLong, match=r"sums has 1 prompts .* context of 8; .*123"
    ) as caught:
        read(f"sums={file}", context_length=8)
    assert caught.value.field == "eval_set"
    (kept,) = read(f"sums={file}", context_length=8, skip_long=True)
    assert questions(kept) == {"1+1="} and kept.longest.longest == 4
    with pytest.raises(InvalidRequest, match=r"sums .* has no problem"):
        read(f"sums={file}", context_length=2, skip_long=True)


def test_columns_are_those_of_the_files_among_the_sets(tmp_path: Path) -> None:
    path = tmp_path / "named.jsonl"
    path.write_text("\n".join(json.dumps({"q": p, "a": 1}) for p in PROMPTS) + "\n")
    data = DataOptions(prompt_column="q", answer_column="a")
    sums, largest = read(f"sums={path}", "big=largest", data=data)
    assert questions(sums) == set(PROMPTS) and largest.eval_set.environment.name == "largest"
    with pytest.raises(InvalidRequest, match=r"prompt_column: .*largest") as caught:
        read("big=largest", data=data)
    assert caught.value.field == "prompt_column"


def test_a_file_needs_answers_where_its_reward_does(tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS) + "\n")
    (given,) = read(f"open={path}", needs_answer=False)
    assert questions(given) == set(PROMPTS)
    with pytest.raises(InvalidRequest, match=r"open: .*no column for the answer") as caught:
        read(f"open={path}")
    assert caught.value.field == "eval_set"


@pytest.mark.parametrize(
    "reward,on_file,as_run",
    [
        ((), True, False),
        (("task",), True, True),
        (("code",), True, True),
        ((), False, False),
        (("task", "code"), False, False),
        (("code",), False, True),
    ],
)
def test_a_set_that_is_a_file_is_graded_by_the_reward_of_the_run(
    reward: tuple[str, ...], on_file: bool, as_run: bool, tmp_path: Path
) -> None:
    file = select_environment(write(tmp_path / "sums.jsonl", PROMPTS))
    trained = file if on_file else select_environment("largest")
    rewards = RewardOptions(reward=reward)
    assert graded_as_run(rewards, trained, file) == as_run
    assert not graded_as_run(rewards, trained, select_environment("sorting"))


@pytest.mark.parametrize("reward", [("task",), ("task", "code"), ("code",), ()])
def test_where_nothing_is_trained_every_reward_is_one_of_files(
    reward: tuple[str, ...], tmp_path: Path
) -> None:
    file = select_environment(write(tmp_path / "sums.jsonl", PROMPTS))
    rewards = RewardOptions(reward=reward)
    assert graded_as_run(rewards, None, file) == bool(reward)
    assert not graded_as_run(rewards, None, select_environment("sorting"))
