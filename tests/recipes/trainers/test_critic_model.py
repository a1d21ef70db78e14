"""A critic that starts from a reward model, against what transformers scores with that."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import InvalidRequest
from recipes.settings.options import PpoOptions
from recipes.trainers.critic_model import check_critic_model
from recipes.trainers.critic_options import CriticOptions
from recipes.trainers.model import load_critic, load_trainer
from recipes.trainers.plain import Trainer
from recipes.types import Trajectory
from recipes.world import World
from rollout.offline import load_tokenizer
from tests.helpers import critic_ranks as critics
from tests.helpers.char_model import char_model, write_char_model
from tests.helpers.char_reward import reward_model, write_reward_model
from tests.helpers.fake_actor import FakeActor


def scores(model: torch.nn.Module, trajectory: Trajectory) -> list[float]:
    """The reward model's score of all before each response token, each a text of its own."""
    ids = torch.from_numpy(np.concatenate([trajectory.prompt_ids, trajectory.response_ids])).long()
    ends = range(len(trajectory.prompt_ids), len(ids))
    with torch.no_grad():
        return [float(model(ids[None, :end]).logits[0, 0]) for end in ends]


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3", "gemma3"])
def test_values_before_training_are_the_scores_of_transformers(arch: str) -> None:
    original, batch = critics.reward_model(arch), critics.batch(0)
    want = [scores(original, trajectory) for trajectory in batch.trajectories]
    trainer = critics.plain(critics.reward_model(arch))
    for got, expected in zip(trainer.values(batch.trajectories), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def options_of(folder: Path, *, normalise_values: bool = False) -> PpoOptions:
    """Policy and reward model are written to the folder."""
    write_char_model(folder / "policy", char_model(16, 1))
    write_reward_model(folder / "scores", reward_model(steps=0))
    critic = CriticOptions(
        critic="own",
        critic_model=str(folder / "scores"),
        normalise_values=normalise_values,
    )
    return PpoOptions(model=str(folder / "policy"), dtype="float32", value_function=critic)


def open_critic(options: PpoOptions) -> Trainer:
    actor = FakeActor(char_model(16, 1), [0])
    critic = load_critic(options, actor, load_trainer(options, actor), World())
    assert critic is not None and isinstance(critic._learner, Trainer)
    return critic._learner


@pytest.mark.parametrize("normalises", [False, True])
def test_the_option_opens_a_reward_model_with_its_head(tmp_path: Path, normalises: bool) -> None:
    """Deviations from a mean start at none."""
    options = options_of(tmp_path, normalise_values=normalises)
    check_critic_model(options, load_tokenizer(options.model), longest=64)
    original = reward_model(steps=0)
    # 0 is the padding, behind which transformers scores nothing.
    trajectories = tuple(
        dataclasses.replace(
            t, prompt_ids=1 + t.prompt_ids % 10, response_ids=1 + t.response_ids % 10
        )
        for t in critics.batch(0).trajectories
    )
    values = open_critic(options).values(trajectories)
    for got, trajectory in zip(values, trajectories, strict=True):
        want = np.zeros(len(got)) if normalises else scores(original, trajectory)
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_critic_on_a_reward_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first, second = (critics.plain(critics.reward_model()) for _ in range(2))
    critics.learn(first, critics.ALONE, last=2, own=True)
    first.save(tmp_path)
    second.load(tmp_path)
    rows = [critics.learn(t, critics.ALONE, first=2, own=True) for t in (first, second)]
    assert rows[0] == rows[1]
    values = [np.concatenate(t.values(critics.batch(0).trajectories)) for t in (first, second)]
    assert np.array_equal(*values)


def test_a_classifier_of_several_labels_is_refused_by_the_option(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    config = tmp_path / "scores" / "config.json"
    names = {str(label): f"LABEL_{label}" for label in range(3)}
    config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": names}))
    with pytest.raises(InvalidRequest, match=r"^critic_model: .* scores 3 labels") as caught:
        check_critic_model(options, load_tokenizer(options.model), longest=64)
    assert caught.value.field == "critic_model"
