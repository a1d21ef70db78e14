"""A reward model's engine as a reward: raw scores, restarts, failures of single replies."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.errors import EngineDead, InvalidRequest
from recipes.rewards.base import Failed, Grade, Item
from recipes.rewards.reward_models.model_chat import ModelChat
from recipes.rewards.reward_models.reward_model import RewardModel
from rollout.replica.base import Replica
from rollout.replica.spawned import ProcessReplica
from tests.helpers.engines import make_replica
from tests.helpers.reward_items import items
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

REPLIES = ["4", "5", "four", "4"]
CONTEXT = 64


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("scorer")
    return folder, write_tiny(folder, classifier=True, num_labels=2, vocab_size=300)


def config_of(folder: Path) -> EngineConfig:
    cache = CacheConfig(num_pages=100, page_size=8)
    return EngineConfig(
        model=str(folder), device="cpu", dtype="float32", context_length=CONTEXT, cache=cache
    )


def inline(folder: Path) -> Replica:
    return make_replica(folder, context_length=CONTEXT, max_chunk_tokens=8)


def reward_of(folder: Path, **options: Any) -> RewardModel:
    given = {"launch": lambda: inline(folder), **options}
    return RewardModel(config_of(folder), tiny_tokenizer(), **given)


def grade(reward: RewardModel, asked: list[Item]) -> list[Grade]:
    return asyncio.run(reward.grade(asked))


@torch.no_grad()
def wanted(model: Any, label: int) -> list[float]:
    chat = ModelChat(tiny_tokenizer())
    rows = [torch.tensor(chat.ids(item)).long() for item in items(REPLIES)]
    return [float(model(row[None]).logits[0, label]) for row in rows]


@pytest.mark.parametrize("label", [0, 1])
def test_rewards_are_raw_scores_of_the_label(label: int, scorer: tuple[Path, Any]) -> None:
    folder, model = scorer
    reward = reward_of(folder, label=label)
    for _ in range(2):
        found = grade(reward, items(REPLIES))
        np.testing.assert_allclose(found, wanted(model, label), atol=1e-4)
        assert found[0] == found[3]
    assert grade(reward, []) == []
    asyncio.run(reward.close())
    asyncio.run(reward.close())
    with pytest.raises(EngineDead, match="closed"):
        grade(reward, items(REPLIES))


def test_a_call_leaves_no_cached_prefix(scorer: tuple[Path, Any]) -> None:
    reward = reward_of(scorer[0])
    grade(reward, items(REPLIES))
    assert reward._engine.state().cached_pages == 0
    asyncio.run(reward.close())


def test_a_reply_that_is_too_long_fails_alone(scorer: tuple[Path, Any]) -> None:
    folder, model = scorer
    reward = reward_of(folder)
    found = grade(reward, items([REPLIES[0], "x" * CONTEXT, REPLIES[1]]))
    assert isinstance(found[1], Failed) and found[1].kind == "too_long"
    np.testing.assert_allclose([found[0], found[2]], wanted(model, 0)[:2], atol=1e-4)
    asyncio.run(reward.close())


def test_what_cannot_be_a_reward_is_refused_by_option(
    scorer: tuple[Path, Any], tmp_path: Path
) -> None:
    write_tiny(tmp_path, vocab_size=300)
    with pytest.raises(InvalidRequest, match="ForSequenceClassification") as caught:
        reward_of(tmp_path)
    assert caught.value.field == "reward"
    with pytest.raises(InvalidRequest, match="2 labels") as caught:
        reward_of(scorer[0], label=2)
    assert caught.value.field == "reward_label"


class _Dying:
    """Launches replicas, of which those of `doomed` die in their first step."""

    def __init__(self, folder: Path, doomed: set[int]) -> None:
        self.num_launched = 0
        self._folder, self._doomed = folder, doomed

    def __call__(self) -> Replica:
        number, self.num_launched = self.num_launched, self.num_launched + 1
        replica = inline(self._folder)
        if number in self._doomed:
            dead = EngineDead("killed by a test", field="leader")

            def die() -> Any:
                replica.state = replica.send = raised
                raise dead

            def raised(*_: object) -> Any:
                raise dead

            replica.step = die
        return replica


def test_an_engine_that_dies_is_started_again(scorer: tuple[Path, Any]) -> None:
    folder, model = scorer
    launch = _Dying(folder, {0})
    reward = reward_of(folder, launch=launch)
    np.testing.assert_allclose(grade(reward, items(REPLIES)), wanted(model, 0), atol=1e-4)
    assert launch.num_launched == 2
    asyncio.run(reward.close())


def test_an_engine_that_dies_twice_fails_its_replies_and_serves_the_next(
    scorer: tuple[Path, Any],
) -> None:
    folder, model = scorer
    reward = reward_of(folder, launch=_Dying(folder, {0, 1}))
    found = grade(reward, items(REPLIES))
    assert all(isinstance(grade, Failed) and grade.kind == "died" for grade in found)
    assert "killed by a test" in str(found[0])
    np.testing.assert_allclose(grade(reward, items(REPLIES)), wanted(model, 0), atol=1e-4)
    asyncio.run(reward.close())


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again(scorer: tuple[Path, Any]) -> None:
    folder, model = scorer
    started: list[ProcessReplica] = []

    def launch() -> Replica:
        started.append(ProcessReplica(config_of(folder)))
        return started[-1]

    reward = reward_of(folder, launch=launch)
    np.testing.assert_allclose(grade(reward, items(REPLIES)), wanted(model, 0), atol=1e-4)
    os.kill(started[0]._process.pid, signal.SIGKILL)
    np.testing.assert_allclose(grade(reward, items(REPLIES)), wanted(model, 0), atol=1e-4)
    assert len(started) == 2
    asyncio.run(reward.close())
