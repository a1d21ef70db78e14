"""Tasks by name: built in, from a file, from reasoning-gym."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.data.data_options import DataOptions
from recipes.environments.base import heldout_problems, problem_at
from recipes.environments.named_tasks import BUILT_IN, is_file_task, select_environment


def test_built_in_names() -> None:
    for name in BUILT_IN:
        assert select_environment(name).name == name


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(InvalidRequest, match=r"largest.*jsonl.*gym") as caught:
        select_environment("biggest")
    assert caught.value.field == "task"


def test_jsonl_is_verified_mathematically(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    lines = [f'{{"prompt": "What is {i}/2?", "answer": {i / 2}, "id": {i}}}' for i in range(60)]
    path.write_text("\n".join(lines) + "\n\n")
    task = select_environment(str(path))
    problem = problem_at(task, "train", 0, 0)
    assert task.messages(problem) == [{"role": "user", "content": problem.question}]
    assert task.verify(f"It is ${problem.answer}$", problem) == 1.0
    assert task.verify("It is $977$", problem) == 0.0
    heldout = {p.key for p in heldout_problems(task, 100)}
    assert 0 < len(heldout) < 30


@pytest.mark.parametrize("line", ['{"prompt": "a"}', "not json", '{"prompt": 1, "answer": "b"}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(InvalidRequest, match=r"bad\.jsonl:2"):
        select_environment(str(path))


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no file"):
        select_environment(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidRequest, match="no problems"):
        select_environment(str(tmp_path / "empty.jsonl"))


def test_columns_and_splits_are_of_files_alone(tmp_path: Path) -> None:
    for task in ("largest", "gym:chain_sum", "biggest"):
        with pytest.raises(InvalidRequest, match=f"which the task {task} is not") as caught:
            select_environment(task, DataOptions(heldout="1/4"))
        assert caught.value.field == "heldout"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "rows.csv").write_text("question,grade\n1+1=,2\n")
    task = select_environment(str(tmp_path / "d"), DataOptions(answer_column="grade"))
    assert task.name == "d"
    (tmp_path / "t.xlsx").write_text("")
    with pytest.raises(InvalidRequest, match="no known format"):
        select_environment(str(tmp_path / "t.xlsx"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a poem"}\n')
    assert select_environment(str(tmp_path / "p.jsonl"), needs_answer=False).name == "p"
    assert is_file_task("none.parquet") and not is_file_task("largest")


class FakeDataset:
    """What reasoning-gym hands out: items by index, and a scorer that wants the item back."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"q{index}", "answer": str(index), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0 if answer == entry["answer"] else 0.01


def fake_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dataset(name: str, **config: Any) -> FakeDataset:
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return FakeDataset()

    module = ModuleType("reasoning_gym")
    module.create_dataset = create_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_gym_tasks_keep_the_items_they_hand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gym(monkeypatch)
    task = select_environment("gym:chain_sum")
    problem = problem_at(task, "train", 0, 0)
    assert task.verify(f" {problem.answer} ", problem) == 1.0
    assert task.verify("x", problem) == 0.01
    with pytest.raises(InvalidRequest, match="not registered"):
        select_environment("gym:nothing")


def test_gym_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InvalidRequest, match=r"\.\[gym\]"):
        select_environment("gym:chain_sum")
