"""The value head on a prefix tree against plain forward passes, a sequence at a time."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.algorithms.losses import policy_loss
from recipes.algorithms.presets import preset
from recipes.algorithms.values import token_value_loss
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.microbatch import score
from recipes.trainers.plain import Trainer
from recipes.types import Batch
from tests.helpers import critic_ranks as critics
from tests.helpers.tiny_models import tiny_hf
from tests.recipes.trainers.test_plain import plain_gradient

LOSS = functools.partial(policy_loss, algorithm=preset("grpo", 8))


def plain_values(trainer: Trainer, batch: Batch) -> list[torch.Tensor]:
    """The reference: the head on the state behind the final norm, one whole sequence at a time."""
    assert trainer.head is not None
    values = []
    for t in batch.trajectories:
        ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids])).long()
        hidden = trainer.model.model(ids[None]).last_hidden_state[0]
        values.append(trainer.head.linear(hidden)[len(t.prompt_ids) - 1 : -1, 0])
    return values


def plain_value_loss(trainer: Trainer, batch: Batch) -> torch.Tensor:
    assert batch.values is not None and batch.returns is not None
    rows = zip(
        plain_values(trainer, batch), batch.values, batch.returns, batch.weights, strict=True
    )
    total = torch.zeros(())
    for new, old, returns, weight in rows:
        loss = token_value_loss(new, torch.from_numpy(old), torch.from_numpy(returns), critics.CLIP)
        total = total + float(weight) * loss.sum()
    return total


def head_gradient(trainer: Trainer) -> list[torch.Tensor]:
    assert trainer.head is not None
    return trainer.head._gradient


def trained(arch: str = "llama", budget: int = 4096) -> Trainer:
    """A trainer whose head is not zero any more, so that the trunk has a gradient of it."""
    trainer = critics.plain(critics.model(arch), budget=budget)
    assert trainer.head is not None
    torch.manual_seed(3)
    torch.nn.init.normal_(trainer.head.linear.weight)
    torch.nn.init.constant_(trainer.head.linear.bias, 0.3)
    return trainer


@pytest.mark.parametrize(
    "arch", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3"]
)
def test_the_last_of_the_hidden_states_is_what_the_logits_are_computed_from(arch: str) -> None:
    model = tiny_hf(arch, vocab_size=critics.VOCAB)
    read: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    output = model(torch.arange(6)[None], output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], read[0])


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_values_are_those_of_plain_forward_passes(arch: str) -> None:
    trainer, batch = trained(arch), critics.batch(0)
    with torch.no_grad():
        expected = plain_values(trainer, batch)
    assert float(torch.cat(expected).std()) > 0.1
    for got, want in zip(trainer.values(batch.trajectories), expected, strict=True):
        assert got.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(got), want, atol=2e-5, rtol=0)


def test_a_new_head_values_everything_at_zero() -> None:
    values = critics.plain().values(critics.batch(0).trajectories)
    assert not np.concatenate(values).any()


@pytest.mark.parametrize("budget", [4096, 12])
def test_gradients_of_policy_and_value_loss_add_up(budget: int) -> None:
    """Sequences without an advantage learn their values all the same."""
    trainer, batch = trained(budget=budget), critics.batch(0)
    for advantages in batch.advantages[:4]:
        advantages[:] = 0
    policy = plain_gradient(trainer.model, batch)
    loss = critics.COEF * plain_value_loss(trainer, batch)
    assert trainer.head is not None
    parameters = [*trainer.model.parameters(), *trainer.head.linear.parameters()]
    value = torch.autograd.grad(loss, parameters, allow_unused=True)
    metrics = TokenMetrics()
    assert trainer.accumulate(batch, LOSS, metrics)
    for parameter, of_policy, of_values in zip(
        trainer.model.parameters(), policy, value, strict=False
    ):
        want = of_policy if of_values is None else of_policy + of_values
        torch.testing.assert_close(parameter.grad, want, atol=3e-5, rtol=1e-4)
    for got, want in zip(head_gradient(trainer), value[-2:], strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
    figures = metrics.result()
    assert figures["critic/vf_loss"] == pytest.approx(float(loss.detach()) / critics.COEF, rel=1e-4)
    assert 0 < figures["critic/vf_clipfrac"] < 1


@pytest.mark.parametrize("trunk", [True, False])
def test_the_value_loss_alone_reaches_the_network_only_where_it_is_to(trunk: bool) -> None:
    trainer, batch = trained(budget=12), critics.batch(0)
    assert trainer.head is not None
    loss = critics.COEF * plain_value_loss(trainer, batch)
    parameters = [*trainer.model.parameters(), *trainer.head.linear.parameters()]
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    metrics = TokenMetrics()
    trainer.accumulate_values(batch, metrics, trunk=trunk)
    assert metrics.result().keys() == {"critic/vf_loss", "critic/vf_clipfrac"}
    for got, want in zip(head_gradient(trainer), expected[-2:], strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
    for parameter, want in zip(trainer.model.parameters(), expected, strict=False):
        if trunk and want is not None:
            torch.testing.assert_close(parameter.grad, want, atol=3e-5, rtol=1e-4)
        else:
            assert parameter.grad is None or not parameter.grad.any()


def test_a_step_of_the_head_leaves_the_model_alone_and_lowers_the_value_loss() -> None:
    trainer, batch = critics.plain(), critics.batch(0)
    model = [p.detach().clone() for p in trainer.model.parameters()]
    losses = []
    for _ in range(30):
        metrics = TokenMetrics()
        trainer.accumulate_values(batch, metrics, trunk=False)
        assert trainer.step_head(1e-2) > 0
        losses.append(metrics.result()["critic/vf_loss"])
    assert losses[-1] < 0.9 * losses[0]
    for parameter, before in zip(trainer.model.parameters(), model, strict=True):
        assert torch.equal(parameter, before)


def test_a_scaled_backward_pass_is_none_of_the_head() -> None:
    """Back ends multiply losses, by the number of processes or to keep float16 in its range."""
    trainer, batch = trained(), critics.batch(0)
    assert trainer.head is not None
    trainer.accumulate_values(batch, TokenMetrics(), trunk=False)
    want = [g.clone() for g in head_gradient(trainer)]
    assert all(g.any() for g in want)
    trainer = trained()
    assert trainer.head is not None
    scores, _ = score(trainer.model, batch.trajectories, 1.0, trainer.head)
    assert scores.values is not None
    (trainer.head.loss(batch, scores.values, TokenMetrics()) * 1024).backward()
    for got, wanted in zip(head_gradient(trainer), want, strict=True):
        torch.testing.assert_close(got, wanted)
    trainer.head.step(1e-2)
    assert not any(g.any() for g in head_gradient(trainer))


def test_tokens_out_of_the_loss_are_out_of_the_value_loss() -> None:
    trainer, batch = trained(), critics.batch(0)
    kept = tuple(np.arange(len(a)) > 0 for a in batch.advantages)
    trainer.accumulate_values(dataclasses.replace(batch, kept=kept), TokenMetrics(), trunk=False)
    some = [g.clone() for g in head_gradient(trainer)]
    trainer = trained()
    trainer.accumulate_values(batch, TokenMetrics(), trunk=False)
    assert not torch.allclose(some[0], head_gradient(trainer)[0], atol=1e-4)


def test_a_loaded_trainer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first, second = critics.plain(), critics.plain()
    rows: list[list[Any]] = []
    critics.learn(first, critics.ALONE, last=2)
    first.save(tmp_path)
    second.load(tmp_path)
    for trainer in (first, second):
        rows.append(critics.learn(trainer, critics.ALONE, first=2))
    assert rows[0] == rows[1]
    assert first.head is not None and second.head is not None
    for ours, theirs in zip(
        first.head.linear.parameters(), second.head.linear.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.any()
