"""A task is refused before a model is loaded, by the lines that are wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import recipes.run.opening
from engine.errors import ContextTooLong, InvalidRequest
from recipes.collecting.prompts import Prompts
from recipes.environments.base import heldout_problems, problem_at, split_of
from recipes.environments.jsonl import JsonLines, load_jsonl
from recipes.environments.procedural import largest
from recipes.environments.task_check import CheckedTask, check_pool, check_task
from recipes.grpo import main
from tests.helpers.char_model import CharAddition, char_model, char_tokenizer, write_char_model
from tests.helpers.fake_actor import FakeActor


def write(path: Path, prompts: list[str]) -> Path:
    rows = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in prompts]
    path.write_text("\n".join(rows) + "\n")
    return path


def check(environment: Any, context_length: int = 64, **options: Any) -> CheckedTask:
    prompts = Prompts(environment, char_tokenizer(), ())
    return check_task(environment, prompts, context_length=context_length, num_heldout=8, **options)


def sums(num: int) -> list[str]:
    return [f"{a}+1=" for a in range(num)]


def test_a_prompt_that_does_not_fit_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [*sums(40), "1" * 64, "2" * 63, *["3" * 70] * 4])
    with pytest.raises(ContextTooLong) as caught:
        check(load_jsonl(path))
    told = str(caught.value)
    assert caught.value.field == "task"
    assert f"{path}:41 (64 tokens), {path}:43 (70 tokens)" in told and "and 2 more" in told
    assert "--skip-long-prompts" in told
    assert f"{path}:42" not in told


def test_long_prompts_are_left_out_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "t.jsonl", ["1" * 64, *sums(40), "2" * 63])
    with caplog.at_level(logging.WARNING):
        task = check(load_jsonl(path), skip_long=True)
    assert f"{path}:1 (64 tokens)" in caplog.text and "left out" in caplog.text
    assert isinstance(task.environment, JsonLines)
    assert len(task.environment.lines) == 41
    assert (task.longest, task.where) == (63, f"{path}:42")
    assert all(len(p.question) < 64 for p in heldout_problems(task.environment, 40))


@pytest.mark.parametrize(
    "split,told", [("train", "5 to train on and 0"), ("heldout", "0 to train")]
)
def test_a_file_too_small_for_both_splits(tmp_path: Path, split: str, told: str) -> None:
    prompts = [prompt for prompt in sums(400) if split_of(prompt, 8) == split][:5]
    path = write(tmp_path / "t.jsonl", prompts * 30)
    with pytest.raises(
        InvalidRequest, match=rf"5 different prompts .*{told}.* add lines"
    ) as caught:
        check(load_jsonl(path))
    assert caught.value.field == "task"


def test_a_small_file_that_has_both_will_do(tmp_path: Path) -> None:
    task = check(load_jsonl(write(tmp_path / "t.jsonl", sums(40)))).environment
    assert heldout_problems(task, 8)
    assert problem_at(task, "train", 0, 0)


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    class Silent:
        chat_template = None

        def encode(self, text: str) -> list[int]:
            return [1] if text == "\n" else []

    task = load_jsonl(write(tmp_path / "t.jsonl", sums(3)))
    with pytest.raises(InvalidRequest, match=r"t\.jsonl:1 has no tokens"):
        check_task(
            task,
            Prompts(task, Silent(), ()),  # type: ignore[arg-type]
            context_length=8,
            num_heldout=1,
        )


def test_a_generated_task_that_does_not_fit() -> None:
    assert check(CharAddition()).longest == 6
    with pytest.raises(ContextTooLong, match="longer context"):
        check(CharAddition(), context_length=6)
    with pytest.raises(ContextTooLong, match="largest"):
        check(largest())


def test_a_cache_too_small_for_one_reply(tmp_path: Path) -> None:
    task = check(load_jsonl(write(tmp_path / "t.jsonl", [*sums(40), "1" * 12])))
    state = FakeActor(char_model(16, 1), [0]).state()
    check_pool(task, state, 4)
    with pytest.raises(
        InvalidRequest, match=r"t\.jsonl:41 \(12 tokens\).*--kv-memory-gb"
    ) as caught:
        check_pool(task, state, 5)
    assert caught.value.field == "kv_memory_gb"


def test_a_run_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_char_model(tmp_path / "model", char_model(16, 1))
    path = write(tmp_path / "t.jsonl", [*sums(40), "7" * 100])
    monkeypatch.delattr(recipes.run.opening, "launch_actor")
    monkeypatch.delattr(recipes.run.opening, "load_trainer")
    words = ["--task", str(path), "--model", str(tmp_path / "model")]
    words += ["--out", str(tmp_path / "o")]
    assert main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("ContextTooLong (task): ") and f"{path}:41 (100 tokens)" in told
    assert not (tmp_path / "o").exists()
