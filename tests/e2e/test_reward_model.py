"""A policy that learns from a reward model alone becomes better at the task itself.

The reward model was taught on pairs of a right and a wrong answer, by its own process in the run;
what is asserted is the true accuracy on held-out problems, which the run never sees.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

RATES = ((40, 3e-4), (80, 1e-4))
"""Steps of a run, and its learning rate."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for more: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_reward_model_teaches_what_it_was_taught(tmp_path: Path) -> None:
    """By one of two rates: which of them a run of so few steps learns at depends on the order of
    sums, which is the processor's."""
    taught = reward_model(steps=200)
    assert pair_accuracy(taught) > 0.9
    write_reward_model(tmp_path / "reward", taught)
    learner = policy(accuracy=0.3)
    before = true_accuracy(learner)
    assert before < 0.6
    write_char_model(tmp_path / "policy", learner)
    found = []
    for steps, lr in RATES:
        after, summary = _taught(tmp_path, steps, lr)
        found.append(after)
        if after >= before + 0.2:
            # The run itself sees scores alone, which have no scale: they rose too.
            assert summary["eval_after"] > summary["eval_before"]
            lines = (tmp_path / str(steps) / "metrics.jsonl").read_text().splitlines()
            assert len([json.loads(line) for line in lines]) == steps
            return
    pytest.fail(f"true accuracy went from {before} to {found}")


def _taught(folder: Path, steps: int, lr: float) -> tuple[float, dict[str, Any]]:
    """The policy's true accuracy after a run on the reward model's scores, and its summary."""
    options = RunOptions(
        model=str(folder / "policy"),
        out=str(folder / str(steps)),
        steps=steps,
        eval_every=0,
        eval_prompts=32,
        checkpoint_every=0,
        dtype="float32",
        device="cpu",
        rollout=RolloutOptions(prompts_per_step=16, kv_memory_gb=0.05),
        optimizer=OptimizerOptions(lr=lr),
        rewards=RewardOptions(reward=(f"model:{folder / 'reward'}",)),
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
    return after, summary
