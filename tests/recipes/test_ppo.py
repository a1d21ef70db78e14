"""The loop of PPO with a tiny model and the fake engine: it learns, it resumes, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.errors import ContextTooLong, InvalidRequest, ModelNotFound
from recipes.algorithms.presets import AlgorithmOptions, preset
from recipes.collecting.batching import make_batch
from recipes.ppo import main, train
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.run.run import Run
from recipes.run.sampling import sample_groups
from recipes.settings.options import PpoOptions, RolloutOptions
from recipes.trainers.checkpoint import checkpoint_bytes
from recipes.trainers.critic import FOLDER
from recipes.trainers.critic_model import check_critic_model
from recipes.trainers.critic_options import CriticOptions
from recipes.trainers.model import load_critic, load_trainer
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.types import Problem
from recipes.world import World
from rollout.offline import load_tokenizer
from tests.helpers.char_model import CharAddition, char_model, char_tokenizer, write_char_model
from tests.helpers.char_reward import reward_model, write_reward_model
from tests.helpers.fake_actor import FakeActor
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.helpers.trajectories import per_token, random_groups

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]
WARMUP = 2


class Digits(CharAddition):
    """A reward that a random model can find: the share of digits in the reply."""

    def verify(self, reply: str, problem: Problem) -> float:
        return sum(c.isdigit() for c in reply) / max(len(reply), 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("char_model")
    write_char_model(folder, char_model(16, 1))
    return str(folder)


def options_of(model: str, out: Path, **changes: Any) -> PpoOptions:
    critic = changes.pop("critic", "shared")
    normalise_values = changes.pop("normalise_values", False)
    options = PpoOptions(
        model=model,
        out=str(out),
        steps=4,
        eval_every=2,
        eval_prompts=4,
        checkpoint_every=2,
        dtype="float32",
        rollout=RolloutOptions(prompts_per_step=12, samples=1, max_new_tokens=3),
        optimizer=OptimizerOptions(lr=5e-3),
        objective=AlgorithmOptions(
            algorithm="ppo",
            num_iterations=2,
            num_minibatches=2,
            kl_coef=0.1,
            kl_controller="adaptive",
            kl_target=1e-4,
            kl_horizon=50,
            normalise_rewards=True,
        ),
        value_function=CriticOptions(
            critic=critic, critic_warmup_steps=WARMUP, normalise_values=normalise_values
        ),
    )
    return dataclasses.replace(options, **changes)


def make_run(options: PpoOptions) -> Run:
    actor = FakeActor(char_model(16, 1), [0])
    trainer = load_trainer(options, actor)
    return assemble(
        options,
        Ledger(),
        environment=Digits(),
        actor=actor,
        tokenizer=char_tokenizer(),
        trainer=trainer,
        critic=load_critic(options, actor, trainer, World()),
    )


def go(options: PpoOptions) -> tuple[Run, dict[str, Any]]:
    run = make_run(options)
    with run.display:
        run.begin()
        train(run)
        summary = run.finish()
    run.folder.close()
    return run, summary


def untimed(run: Run) -> list[dict[str, Any]]:
    timed = ("timing_s/", "perf/rollout_tokens_per_s", "push/")
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)}
        for row in run.folder.read_metrics()
    ]


def parameters(run: Run) -> list[torch.Tensor]:
    """Of the policy, the critic's network and its head."""
    assert run.critic is not None and isinstance(run.trainer, Trainer)
    learner = run.critic._learner
    assert isinstance(learner, Trainer) and learner.head is not None
    modules = (run.trainer.model, learner.model, learner.head.linear)
    return [p for module in modules for p in module.parameters()]


@pytest.mark.parametrize("critic", ["shared", "own"])
def test_the_reward_goes_up_and_the_critic_foresees_it(
    model: str, tmp_path: Path, critic: str
) -> None:
    options = options_of(
        model,
        tmp_path / "run",
        steps=24,
        checkpoint_every=0,
        eval_every=0,
        critic=critic,
        objective=AlgorithmOptions(algorithm="ppo", num_iterations=2, num_minibatches=2),
    )
    run, summary = go(options)
    rows = run.folder.read_metrics()
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.15
    assert abs(rows[-1]["critic/vpred_mean"] - rows[-1]["critic/returns/mean"]) < 0.25
    assert rows[0]["critic/vpred_mean"] == 0.0 and rows[0]["critic/vf_explained_var"] == 0.0
    assert rows[-1]["critic/vf_loss"] < rows[0]["critic/vf_loss"]
    assert summary["algorithm"] == "ppo"
    assert summary["critic"] == {"network": critic, "model": model}
    loaded = AutoModelForCausalLM.from_pretrained(run.folder.model)
    assert isinstance(run.trainer, Trainer)
    for ours, theirs in zip(loaded.parameters(), run.trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("critic", ["shared", "own"])
def test_two_steps_and_two_resumed_are_four(model: str, tmp_path: Path, critic: str) -> None:
    """Bit for bit: policy, critic, weight of the KL, moments of rewards and returns."""
    unit = {"critic": critic, "normalise_values": True}
    unbroken, expected = go(options_of(model, tmp_path / "a", **unit, steps=5))
    options = options_of(model, tmp_path / "b", **unit, steps=2)
    first, _ = go(options)
    checkpoint = next(first.folder.checkpoints.glob("step_*"))
    assert (checkpoint / FOLDER).exists() == (critic == "own")
    assert first.critic is not None
    told = first.critic.checkpoint_bytes() + checkpoint_bytes(first.trainer.weights)
    assert told == 12 * sum(p.numel() for p in {*parameters(first)[:-2]})
    resumed, summary = go(dataclasses.replace(options, resume=options.out, steps=5))
    assert untimed(resumed) == untimed(unbroken)
    for ours, theirs in zip(parameters(resumed), parameters(unbroken), strict=True):
        assert torch.equal(ours, theirs)
    assert summary["eval_after"] == expected["eval_after"]
    assert resumed.progress == dataclasses.replace(
        unbroken.progress, seconds=resumed.progress.seconds
    )


@pytest.mark.parametrize("critic", ["shared", "own"])
def test_the_first_steps_train_the_critic_alone(model: str, tmp_path: Path, critic: str) -> None:
    options = options_of(
        model, tmp_path / "run", critic=critic, steps=WARMUP, checkpoint_every=0, eval_every=0
    )
    run, _ = go(options)
    start = char_model(16, 1)
    assert isinstance(run.trainer, Trainer)
    for ours, before in zip(run.trainer.model.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, before)
    assert any(p.any() for p in parameters(run)[-2:])
    for row in run.folder.read_metrics():
        assert row["grad_norm"] == 0.0 and row["critic/grad_norm"] > 0
        assert "loss" not in row and "kl_coef" not in row
        assert row["critic/lr"] == pytest.approx(5 * row["learning_rate"])


def test_every_row_has_the_figures_of_policy_and_critic(model: str, tmp_path: Path) -> None:
    run, _ = go(options_of(model, tmp_path / "run", steps=WARMUP + 1))
    row = run.folder.read_metrics()[-1]
    names = "vf_loss vf_clipfrac vf_explained_var vpred_mean returns/mean lr"
    assert {f"critic/{name}" for name in names.split()} <= row.keys()
    assert {"loss", "entropy", "kl", "kl_coef", "clip_ratio/region_mean", "grad_norm"} <= (
        row.keys()
    )


@pytest.mark.parametrize("normalise_values", [True, False])
def test_rewards_far_from_one_are_foreseen_in_units_of_their_spread(
    model: str, tmp_path: Path, normalise_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards of 1,000 and 1,100: a head that starts at zero and is clipped at 0.2 does not get
    there in a few steps, unless it learns deviations."""
    monkeypatch.setattr(Digits, "verify", lambda self, reply, problem: 1e3 + 1e2 * reply.isdigit())
    options = options_of(
        model,
        tmp_path / "run",
        steps=8,
        checkpoint_every=0,
        eval_every=0,
        normalise_values=normalise_values,
        objective=AlgorithmOptions(algorithm="ppo", num_iterations=2, num_minibatches=2),
    )
    run, _ = go(options)
    row = run.folder.read_metrics()[-1]
    assert 1e3 <= row["critic/returns/mean"] <= 1.1e3
    apart = abs(row["critic/vpred_mean"] - row["critic/returns/mean"])
    assert (apart < 100) == normalise_values


def test_the_advantages_of_a_batch_are_those_of_its_values() -> None:
    """The reward on the last token, undiscounted, less the critic's value, whitened."""
    groups = random_groups(3, 1, vocab=9)
    trajectories = [t for group in groups for t in group.trajectories]
    values = per_token(trajectories, np.array([0.5, 0.25, 0.0], np.float32))
    algorithm = dataclasses.replace(preset("ppo", 8), gae_lambda=1.0)
    batch = make_batch(groups, algorithm, 8, values=values)
    raw = [
        np.full(len(t.response_ids), t.reward - v[0])
        for t, v in zip(trajectories, values, strict=True)
    ]
    assert batch.returns is not None
    for got, t in zip(batch.returns, trajectories, strict=True):
        assert got.tolist() == pytest.approx([t.reward] * len(got))
    flat = np.concatenate(raw)
    want = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.concatenate(batch.advantages), want, atol=1e-5)
    part = batch.select([2])
    assert part.values is not None and part.values[0] is values[2]


def test_a_step_in_which_nothing_was_graded_changes_nothing(model: str, tmp_path: Path) -> None:
    run = make_run(options_of(model, tmp_path / "run", checkpoint_every=0))
    run.begin()
    before = [p.detach().clone() for p in parameters(run)]
    from recipes.ppo import update

    groups = [
        dataclasses.replace(
            group,
            trajectories=tuple(dataclasses.replace(t, failed="time") for t in group.trajectories),
        )
        for group in sample_groups(run)
    ]
    for objective in ({}, {"num_minibatches": 1}):
        run.algorithm = dataclasses.replace(run.algorithm, **objective)
        for step in (0, WARMUP):
            run.progress.step = step
            update(run, groups)
    for ours, theirs in zip(parameters(run), before, strict=True):
        assert torch.equal(ours, theirs)
    run.folder.close()


def test_a_critic_of_another_vocabulary_is_refused_with_both_sizes(
    model: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_tokenizer().write_hf(other)
    sizes = (load_tokenizer(other).vocab_size, load_tokenizer(model).vocab_size)
    assert sizes[0] != sizes[1]
    options = options_of(model, tmp_path / "run")
    given = CriticOptions(critic="own", critic_model=str(other))
    options = dataclasses.replace(options, value_function=given)
    with pytest.raises(InvalidRequest, match=f"{sizes[0]:,} tokens, .* {sizes[1]:,}") as caught:
        check_critic_model(options, load_tokenizer(model), longest=64)
    assert caught.value.field == "critic_model"


def test_a_critic_with_as_many_other_tokens_is_refused_too(model: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_char_model(other, char_model(16, 1))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"+"', '"*"'))
    given = CriticOptions(critic="own", critic_model=str(other))
    options = dataclasses.replace(options_of(model, tmp_path / "run"), value_function=given)
    with pytest.raises(InvalidRequest, match=r"token 11 is b'\*' there and b'\+' here"):
        check_critic_model(options, load_tokenizer(model), longest=64)
    same = dataclasses.replace(given, critic_model=model)
    options = dataclasses.replace(options, value_function=same)
    check_critic_model(options, load_tokenizer(model), longest=64)
    with pytest.raises(ContextTooLong, match=r"^critic_model: .* context of 64 tokens"):
        check_critic_model(options, load_tokenizer(model), longest=65)


def test_a_critic_that_cannot_be_one_is_refused_by_the_option(model: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_char_model(other, char_model(16, 1))
    given = CriticOptions(critic="own", critic_model=str(other))
    options = dataclasses.replace(options_of(model, tmp_path / "run"), value_function=given)
    config = other / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    for kind, told in (
        (InvalidRequest, "scores 2 labels, and a critic has one value"),
        (ModelNotFound, "no tokenizer.json"),
    ):
        with pytest.raises(kind, match=f"^critic_model: .*{told}") as caught:
            check_critic_model(options, load_tokenizer(model), longest=64)
        assert caught.value.field == "critic_model"
        (other / "tokenizer.json").unlink(missing_ok=True)


def test_the_command_runs_with_the_real_engine_and_goes_on(model: str, tmp_path: Path) -> None:
    """One reply a problem, a critic of its own from a reward model, and a last step by --resume."""
    scores = str(tmp_path / "scores")
    write_reward_model(Path(scores), reward_model(steps=0))
    out = tmp_path / "run"
    words = ["--model", model, "--task", "addition", "--out", str(out), "--steps", "2"]
    words += ["--prompts-per-step", "4", "--num-minibatches", "1", "--eval-prompts", "4"]
    words += ["--kv-memory-gb", "0.05", "--dtype", "float32", "--checkpoint-every", "1"]
    words += ["--critic", "own", "--critic-model", scores, "--critic-warmup-steps", "1"]
    assert main(words) == 0
    assert main(["--resume", str(out), "--steps", "3"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["critic"] == {"network": "own", "model": scores}
