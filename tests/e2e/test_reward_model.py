"""A policy that learns from a reward model alone becomes better at the task itself.

The reward model was taught on pairs of a right and a wrong answer, by its own process in the run;
what is asserted is the true accuracy on held-out problems, which the run never sees.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recipes.actors.launch import launch_actor
from recipes.grpo import train
from recipes.rewards.named_rewards import open_grading
from recipes.rewards.reward_models.open_reward_model import open_reward_model
from recipes.rewards.reward_models.reward_model_options import RewardModelOptions
from recipes.rewards.reward_options import RewardOptions
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.settings.options import RolloutOptions, RunOptions
from recipes.trainers.model import load_trainer
from recipes.trainers.optimizer_options import OptimizerOptions
from rollout.offline import load_tokenizer
from tests.helpers.char_model import write_char_model
from tests.helpers.char_reward import (
    CharLargest,
    pair_accuracy,
    policy,
    reward_model,
    true_accuracy,
    write_reward_model,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS = 120


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for more: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_reward_model_teaches_what_it_was_taught(tmp_path: Path) -> None:
    taught = reward_model(steps=200)
    assert pair_accuracy(taught) > 0.9
    write_reward_model(tmp_path / "reward", taught)
    learner = policy(accuracy=0.3)
    before = true_accuracy(learner)
    assert before < 0.6
    write_char_model(tmp_path / "policy", learner)
    options = RunOptions(
        model=str(tmp_path / "policy"),
        out=str(tmp_path / "run"),
        steps=STEPS,
        eval_every=0,
        eval_prompts=32,
        checkpoint_every=0,
        dtype="float32",
        device="cpu",
        rollout=RolloutOptions(prompts_per_step=16, kv_memory_gb=0.05),
        optimizer=OptimizerOptions(lr=1e-4),
        rewards=RewardOptions(reward=(f"model:{tmp_path / 'reward'}",)),
        reward_model=RewardModelOptions(reward_memory_gb=0.05),
    )
    open_model = functools.partial(open_reward_model, options=options)
    grading = open_grading(options.rewards, CharLargest(), [], open_model=open_model)
    actor = launch_actor(options)
    trainer = load_trainer(options, actor)
    run = assemble(
        options,
        Ledger(),
        environment=CharLargest(),
        grading=grading,
        actor=actor,
        tokenizer=load_tokenizer(options.model),
        trainer=trainer,
    )
    run.begin()
    train(run)
    summary = run.finish()
    trained = trainer.weights
    assert isinstance(trained, torch.nn.Module)
    after = true_accuracy(trained)
    actor.close()
    grading.close()
    assert after >= before + 0.2, (before, after)
    # The run itself sees scores alone, which have no scale: they rose too.
    assert summary["eval_after"] > summary["eval_before"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == STEPS
