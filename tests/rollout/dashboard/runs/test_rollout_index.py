"""Replies that a run kept: listed, sorted, searched and shown token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.run.run_folder import RunFolder
from rollout.dashboard.rollouts import RolloutQuery
from rollout.dashboard.runs import line_tail, rollout_index
from rollout.dashboard.runs.line_tail import LineTail, NewLines
from rollout.dashboard.runs.rollout_index import RolloutIndex
from rollout.dashboard.source import UnknownGroup
from tests.helpers.run_folders import BYTES, groups_of, logprobs_of, run_folder, write_steps


def opened(path: Path, **more: Any) -> RolloutIndex:
    index = RolloutIndex(path, **more)
    index.refresh()
    return index


def heads(index: RolloutIndex, **query: Any) -> list[str]:
    return [row.head for row in index.page(RolloutQuery(**query)).rows]


def line(step: int, rewards: list[Any], texts: list[str], prompt: str = "What?") -> str:
    replies = [
        {"text": text, "reward": reward, "length": len(text)}
        for text, reward in zip(texts, rewards, strict=True)
    ]
    return json.dumps({"step": step, "prompt": prompt, "samples": replies}) + "\n"


def test_a_group_has_the_tokens_that_the_run_sampled(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    index = opened(folder.rollouts_path)
    assert len(index) == 3 * 2 * 4
    sampled = groups_of(2)[1]
    shown = index.group("2-2")
    assert shown.step == 2 and len(shown.samples) == 4
    for reply, sample, logprobs in zip(
        sampled.trajectories, shown.samples, logprobs_of(sampled), strict=True
    ):
        assert (sample.text, sample.reward) == (reply.text, reply.reward)
        assert sample.length == len(reply.response_ids) and sample.tokens is not None
        ids = reply.response_ids.tolist()
        whole = b"".join(BYTES[i] for i in ids).decode(errors="replace")
        assert "".join(sample.tokens.texts) == whole
        assert sample.tokens.logprobs == logprobs
        assert sample.tokens.versions == ["1", *["2"] * (len(ids) - 1)]
    with pytest.raises(UnknownGroup, match="9-1"):
        index.group("9-1")


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(
        line(1, [0.5, None], ["b", "none"])
        + line(2, [1.0, 0.5, math.nan, math.inf], ["ccc", "dd", "nan", "inf"])
    )
    index = opened(path)
    assert heads(index, sort="step") == ["ccc", "dd", "nan", "inf", "b", "none"]
    assert heads(index, sort="step", descending=False)[:2] == ["b", "none"]
    assert heads(index, sort="reward") == ["ccc", "b", "dd", "none", "nan", "inf"]
    assert heads(index, sort="reward", descending=False)[:3] == ["b", "dd", "ccc"]
    assert heads(index, sort="length", limit=1, offset=1) == ["ccc"]
    assert heads(index, reward_min=0.6) == ["ccc"]
    assert heads(index, reward_max=0.5, step=1) == ["b"]
    page = index.page(RolloutQuery(sort="reward", limit=1, offset=5))
    assert (page.total, page.rows[0].reward) == (6, "Infinity")


def test_texts_are_searched_in_any_case_in_memory_and_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(
        line(1, [0, 0], ["Straße", "other"]) + line(2, [0, 0], ["no", "STRASSE"], prompt="Ask ME")
    )
    for text_chars in (1 << 20, 20, 0):
        index = opened(path, text_chars=text_chars)
        assert heads(index, text="strasse", descending=False) == ["Straße", "STRASSE"]
        assert heads(index, text="ask me") == ["no", "STRASSE"]
        assert heads(index, text="nowhere") == []


def test_the_list_follows_a_run_that_goes_on_and_one_that_is_cut(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    index = opened(folder.rollouts_path)
    write_steps(folder, range(4, 6))
    with folder.rollouts_path.open("a") as file:
        file.write('{"step": 6, "pro')
    index.refresh()
    assert len(index) == 5 * 8
    folder.truncate(2)
    index.refresh()
    assert len(index) == 2 * 8
    write_steps(folder, range(3, 4))
    index.refresh()
    assert [row.step for row in index.page(RolloutQuery(limit=1)).rows] == [3]
    assert index.group("3-1").step == 3
    index.close()


def test_samples_of_a_run_without_tokens_are_shown_as_text(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_samples(1, groups_of(1))
    text = json.dumps({"step": 2, "question": "<b>\ud800</b>\x00", "replies": ["\ud800x", "y"],
                       "rewards": [math.nan, None], "failed": ["", "raised: x"]})  # fmt: skip
    with folder.samples_path.open("a") as file:
        file.write(f"{text}\nno row\n[]\n{{}}\n")
    index = opened(folder.samples_path)
    assert len(index) == 8 + 2
    shown = index.group("2-1")
    assert shown.prompt == "<b>\ufffd</b>\x00" and shown.samples[0].text == "\ufffdx"
    assert [s.reward for s in shown.samples] == ["NaN", None]
    assert shown.samples[1].note == "not graded: raised: x" and shown.samples[0].tokens is None


def test_a_file_of_gigabytes_is_never_in_memory_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rollouts.jsonl"
    texts = ["x" * 200]
    path.write_text("".join(line(step, [1.0], texts) for step in range(50)))
    most = []
    look = LineTail.look

    def looked(self: LineTail, most_bytes: int | None = None) -> NewLines:
        found = look(self, most_bytes)
        most.append(sum(map(len, found.lines)))
        return found

    monkeypatch.setattr(line_tail, "_BLOCK", 1000)
    monkeypatch.setattr(rollout_index, "_AT_ONCE", 2000)
    monkeypatch.setattr(LineTail, "look", looked)
    index = opened(path)
    assert len(index) == 50 and max(most) < 3000
    assert len(heads(index, text="XXX")) == 50


def test_nesting_as_deep_as_json_reads_is_a_line_that_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    deep = '{"step": 1, "prompt": NaN, "a": ' + "[" * 600 + "]" * 600 + "}\n"
    path.write_text(deep + line(2, [1.0], ["good"]))
    assert heads(opened(path)) == ["good"]
