"""Replies as a run keeps them, token by token and of bounded size."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from engine.protocol import VersionSpan
from recipes.run import kept_rollouts
from recipes.run.kept_rollouts import pieces, rollout_lines, shortened
from recipes.types import Group
from rollout.dashboard.runs.kept_rollouts import read_tokens
from tests.helpers.run_folders import BYTES, groups_of, logprobs_of


def lines(groups: list[Group], num: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rollout_lines(7, groups, BYTES, num=num).splitlines()]


def test_the_first_groups_are_kept_with_every_token() -> None:
    groups = groups_of(7, num=3)
    kept = lines(groups, 2)
    assert [line["step"] for line in kept] == [7, 7]
    for group, line in zip(groups, kept, strict=False):
        assert [s["logprobs"] for s in line["samples"]] == logprobs_of(group)
        for reply, sample in zip(group.trajectories, line["samples"], strict=True):
            assert len(sample["tokens"]) == sample["length"] == len(reply.response_ids)
            assert sample["spans"] == [[s.version, s.start, s.end] for s in reply.spans]
    assert rollout_lines(7, groups, BYTES, num=0) == b""


def test_long_replies_keep_their_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_rollouts, "TOKENS_A_STEP", 16)
    monkeypatch.setattr(kept_rollouts, "TEXT_CHARS", 10)
    (group,) = groups_of(7, num=1, samples=4)
    long = dataclasses.replace(
        group.trajectories[0],
        response_ids=np.arange(100, dtype=np.int32) % 3,
        rollout_logprobs=np.full(100, np.nan, np.float32),
        spans=(VersionSpan(6, 0, 2), VersionSpan(7, 2, 50), VersionSpan(8, 50, 100)),
        text="0123456789" * 10,
    )
    group = dataclasses.replace(group, trajectories=(long, *group.trajectories[1:]))
    sample = lines([group], 4)[0]["samples"][0]
    assert sample["length"] == 100 and sample["logprobs"] == [None] * 4
    assert sample["tokens"] == ["<eos>", "one ", "two ", "<eos>"]
    assert sample["spans"] == [[6, 0, 2], [7, 2, 4]]
    assert sample["text"] == "01234\n[... 90 characters ...]\n56789"


def test_entropies_are_kept_where_there_are_some_and_shown() -> None:
    (group,) = groups_of(7, num=1, samples=2)
    first, second = group.trajectories
    nats = np.linspace(0.0, 1.0, len(first.response_ids), dtype=np.float32)
    group = dataclasses.replace(
        group, trajectories=(dataclasses.replace(first, entropies=nats), second)
    )
    kept = lines([group], 1)[0]["samples"]
    assert kept[0]["entropies"] == [round(float(value), 4) for value in nats]
    assert "entropies" not in kept[1]
    shown = read_tokens(rollout_lines(7, [group], BYTES, num=1), "7-0")
    assert shown is not None
    tokens = [sample.tokens for sample in shown.samples]
    assert tokens[0] is not None and tokens[0].entropies == kept[0]["entropies"]
    assert tokens[1] is not None and tokens[1].entropies is None


def test_a_character_of_several_tokens_is_with_the_last_of_them() -> None:
    ids = np.array([1, 3, 4, 3, 2, 3], np.int32)
    assert pieces(ids, BYTES) == ["one ", "", "€", "", "\ufffdtwo ", "\ufffd"]
    assert pieces(np.array([], np.int32), BYTES) == []


def test_a_reply_without_a_grade_has_no_reward() -> None:
    (group,) = groups_of(7, num=1, samples=2)
    lost = dataclasses.replace(group.trajectories[0], failed="raised: x", truncated=True)
    group = dataclasses.replace(group, trajectories=(lost, group.trajectories[1]))
    sample = lines([group], 1)[0]["samples"][0]
    assert (sample["reward"], sample["failed"], sample["finish"]) == (None, "raised: x", "length")


def test_short_texts_stay() -> None:
    assert shortened("x" * 20_000) == "x" * 20_000
    assert len(shortened("x" * 50_000)) < 20_100
