"""A task is refused before a model is loaded, by the lines that are wrong."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import recipes.run.opening
from engine.errors import ContextTooLong, InvalidRequest
from recipes.collecting.prompts import Prompts
from recipes.data.chat_style import ChatStyle
from recipes.data.data_options import DataOptions
from recipes.environments.base import heldout_problems, problem_at, split_of
from recipes.environments.file_task import FileTask, load_task
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
        check(load_task(path))
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
        task = check(load_task(path), skip_long=True)
    assert f"{path}:1 (64 tokens)" in caplog.text and "left out" in caplog.text
    assert isinstance(task.environment, FileTask)
    assert task.environment.count("train") + task.environment.count("heldout") == 41
    assert (task.longest, task.where) == (63, f"{path}:42")
    assert all(len(p.question) < 64 for p in heldout_problems(task.environment, 40))


@pytest.mark.parametrize(
    "split,told", [("train", "5 to train on and 0"), ("heldout", "0 to train")]
)
def test_a_file_too_small_for_both_splits(tmp_path: Path, split: str, told: str) -> None:
    prompts = [prompt for prompt in sums(400) if split_of(prompt, 8) == split][:5]
    path = write(tmp_path / "t.jsonl", prompts * 30)
    with pytest.raises(InvalidRequest, match=rf"5 different prompts .*{told}.* add rows") as caught:
        check(load_task(path))
    assert caught.value.field == "task"


def test_a_small_file_that_has_both_will_do(tmp_path: Path) -> None:
    task = check(load_task(write(tmp_path / "t.jsonl", sums(40)))).environment
    assert heldout_problems(task, 8)
    assert problem_at(task, "train", 0, 0)


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    class Silent:
        chat_template = None

        def encode(self, text: str) -> list[int]:
            return [1] if text == "\n" else []

    task = load_task(write(tmp_path / "t.jsonl", sums(3)))
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
    task = check(load_task(write(tmp_path / "t.jsonl", [*sums(40), "1" * 12])))
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
    sheet = tmp_path / "t.csv"
    sheet.write_text("text,label\n" + "".join(f"{line},1\n" for line in sums(40)))
    columns = ["--prompt-column", "text", "--answer-column"]
    for task, words, told in (
        (path, [], f"ContextTooLong .task.: task: .*{path}:41 .100 tokens."),
        (sheet, [], r"InvalidRequest .task.: .*t\.csv:2: no column for the prompt.*text, label"),
        (sheet, [*columns, "lable"], r".*t\.csv:2: no column 'lable' for the answer"),
        (sheet, [*columns, "label", "--heldout", "dev"], r"InvalidRequest .heldout.: .*'dev'"),
        (sheet, [*columns, "label", "--system-prompt", "3" * 70], r".*:2 .75 tokens."),
        (sheet, [*columns, "label", "--chat-template-kwargs", "{}"], r".*no chat template"),
    ):
        words = ["--task", str(task), "--model", str(tmp_path / "model"), *words]
        assert main([*words, "--out", str(tmp_path / "o")]) == 2
        assert re.match(told, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "o").exists()


def test_a_held_out_file_is_looked_at_too(tmp_path: Path) -> None:
    other = write(tmp_path / "h.jsonl", [*sums(3), "7" * 64])
    task = load_task(write(tmp_path / "t.jsonl", sums(9)), DataOptions(heldout=str(other)))
    with pytest.raises(ContextTooLong, match=r"h\.jsonl:4 \(64 tokens\)"):
        check(task)
    kept = check(task, skip_long=True).environment
    assert isinstance(kept, FileTask)
    assert (kept.count("train"), kept.count("heldout")) == (6, 3)
    assert len(heldout_problems(kept, 8)) == 3


def test_a_system_prompt_beside_one_is_named_by_its_row(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": chat, "answer": 2}) + "\n")
    task = load_task(path)
    prompts = Prompts(task, char_tokenizer(), (), ChatStyle(system="1"))
    with pytest.raises(
        InvalidRequest, match=r"the prompt at .*t\.jsonl:1: it begins with a system"
    ):
        check_task(task, prompts, context_length=64, num_heldout=1)
