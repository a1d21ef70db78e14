"""What a supervised run learns and is measured on, checked before a model is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ContextTooLong, InvalidRequest
from recipes.data.data_options import SftDataOptions
from recipes.settings.sft_options import SftOptions
from recipes.tuning.sft_task import SftTask, read_task
from tests.helpers.char_model import char_tokenizer
from tests.helpers.tiny_tokenizer import tiny_tokenizer


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"prompt": prompt, "completion": said}) for prompt, said in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def sums(num: int) -> list[tuple[str, str]]:
    return [(f"{a}+1=", str(a + 1)) for a in range(num)]


def read(task: str, context_length: int = 64, **options: Any) -> SftTask:
    return read_task(SftOptions(task=task, **options), char_tokenizer(), context_length)


def test_a_file_is_divided_and_counted(tmp_path: Path) -> None:
    task = read(write(tmp_path / "t.jsonl", sums(40)), epochs=2.0, eval_prompts=3)
    assert task.name == "t" and task.asked is None
    assert len(task.heldout) == 3
    assert 60 <= task.num < 80


def test_another_task_may_be_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", sums(40))
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in sums(30)))
    task = read(path, eval_task=str(asked))
    assert task.asked is not None and task.asked.environment.name == "asked"


def test_conversations_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "t.jsonl", [*sums(40), ("1+1=", "2" * 58), ("1+1=", "2" * 59)])
    with pytest.raises(ContextTooLong, match=r"t\.jsonl:42 \(65 tokens\); shorten") as caught:
        read(path)
    assert caught.value.field == "task"
    with caplog.at_level(logging.WARNING):
        read(path, skip_long_prompts=True)
    assert "t.jsonl:42 (65 tokens); left out" in caplog.text
    with pytest.raises(InvalidRequest, match="held out that fit; a run needs both"):
        read(write(tmp_path / "u.jsonl", [("1+1=", "2")]))


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", sums(9))
    refuses = tiny_tokenizer(template="{{ raise_exception('no') }}")
    with pytest.raises(InvalidRequest, match="no"):
        read_task(SftOptions(task=path), refuses, 64)
    style = SftDataOptions(system_prompt="s")
    chat = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    row = {"prompt": chat, "completion": "3"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InvalidRequest, match=r"at .*s\.jsonl:1: it begins with a system message"):
        read(str(tmp_path / "s.jsonl"), data=style)


def test_a_template_without_an_end_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_task(SftOptions(task=write(tmp_path / "t.jsonl", sums(40))), tiny_tokenizer(), 999)
    assert "no token that ends a reply" in caplog.text


@pytest.mark.parametrize(
    "options,field",
    [({"epochs": 1.0}, "epochs"), ({"data": SftDataOptions(heldout="1/4")}, "heldout")],
)
def test_a_task_without_end_has_no_epochs(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match="which the task addition is not") as caught:
        read("addition", 4096, **options)
    assert caught.value.field == field
