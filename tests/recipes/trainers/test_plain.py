"""The trainer on a prefix tree against plain forward passes, a sequence at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import NonFiniteGradient
from recipes.algorithms.losses import LossInputs, LossOutput, policy_loss
from recipes.algorithms.presets import preset
from recipes.trainers.loss_scale import FIRST_POWER
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.types import Batch
from recipes.world import World
from tests.helpers import trainer_ranks as ranks
from tests.helpers.tiny_models import tiny_hf
from tests.helpers.trajectories import random_batch

VOCAB = 20
TEMPERATURE = 0.7
LOSS = functools.partial(policy_loss, algorithm=preset("grpo", 8))

FIRST = 2.0**FIRST_POWER


def trainer_of(
    arch: str = "llama", budget: int = 4096, sizes: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "head_dim": 8, **(sizes or {})}
    return Trainer(
        tiny_hf(arch, **sizes),
        OptimizerOptions(max_tokens_per_microbatch=budget, **options),
        device=torch.device("cpu"),
        dtype=torch.float32,
        temperature=TEMPERATURE,
        reference=tiny_hf(arch, **sizes),
    )


def plain_logprobs(model: Any, batch: Batch) -> list[torch.Tensor]:
    """The reference: one forward pass over each whole sequence."""
    scored = []
    for t in batch.trajectories:
        ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids])).long()
        logits = model(ids[None]).logits[0].float() / TEMPERATURE
        logprobs = logits.log_softmax(-1)[len(t.prompt_ids) - 1 : -1]
        scored.append(logprobs.gather(1, ids[len(t.prompt_ids) :, None])[:, 0])
    return scored


def plain_gradient(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Gradient of the on-policy loss, sum of -weight * advantage * logprob."""
    model.zero_grad()
    logprobs = plain_logprobs(model, batch)
    coefficients = [
        torch.from_numpy(a * w) for a, w in zip(batch.advantages, batch.weights, strict=True)
    ]
    loss = -sum((c * lp).sum() for c, lp in zip(coefficients, logprobs, strict=True))
    return list(torch.autograd.grad(loss, list(model.parameters())))


def tree_gradient(trainer: Trainer, batch: Batch) -> list[torch.Tensor]:
    assert trainer.accumulate(batch, LOSS, TokenMetrics())
    return [p.grad for p in trainer.model.parameters() if p.grad is not None]


def test_a_reference_in_host_memory_is_the_same_model() -> None:
    batch = random_batch(3, 4, vocab=VOCAB)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "head_dim": 8}
    scored = []
    for on_host in (False, True):
        trainer = Trainer(
            tiny_hf("llama", seed=1, **sizes),
            OptimizerOptions(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            temperature=TEMPERATURE,
            reference=tiny_hf("llama", **sizes),
            reference_on_host=on_host,
        )
        for _ in range(2):
            scored.append(np.concatenate(trainer.reference_logprobs(batch.trajectories)))
    assert all(np.array_equal(scored[0], other) for other in scored[1:])
    with torch.no_grad():
        expected = torch.cat(plain_logprobs(tiny_hf("llama", **sizes), batch))
    np.testing.assert_allclose(scored[0], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3"])
def test_logprobs_are_those_of_plain_forward_passes(arch: str) -> None:
    trainer, batch = trainer_of(arch), random_batch(3, 4, vocab=VOCAB)
    with torch.no_grad():
        expected = plain_logprobs(trainer.model, batch)
    for got, want in zip(trainer.logprobs(batch.trajectories), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=0)


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {}),
    ("mistral", {}),
    # All its layers slide, whatever this says.
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    ("smollm3", {"use_sliding_window": True}),
]


@pytest.mark.parametrize(("arch", "own"), WINDOWS)
def test_windows_shorter_than_the_sequences_are_those_of_plain_forward_passes(
    arch: str, own: dict[str, Any]
) -> None:
    """The model masks a plain sequence itself; over a tree it takes the masks that it is given."""
    sizes = {"sliding_window": 3, **own}
    trainer, batch = trainer_of(arch, sizes=sizes), random_batch(3, 4, vocab=VOCAB)
    assert max(len(t.prompt_ids) + len(t.response_ids) for t in batch.trajectories) > 6
    with torch.no_grad():
        expected = plain_logprobs(trainer.model, batch)
        trainer.model.config.sliding_window = 100
        wider = plain_logprobs(trainer.model, batch)
        trainer.model.config.sliding_window = 3
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, wider, strict=True))
    for got, want in zip(trainer.logprobs(batch.trajectories), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [4096, 12, 1])
def test_gradients_are_exact_for_every_microbatch_size(budget: int) -> None:
    trainer, batch = trainer_of(budget=budget), random_batch(3, 4, vocab=VOCAB)
    expected = plain_gradient(trainer.model, batch)
    got = tree_gradient(trainer, batch)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_metrics_do_not_depend_on_the_microbatch_size() -> None:
    batch = random_batch(3, 4, vocab=VOCAB)
    results = []
    for budget in (4096, 12):
        metrics = TokenMetrics()
        trainer_of(budget=budget).accumulate(batch, LOSS, metrics)
        results.append(metrics.result())
    computed = [result.pop("perf/trainer_computed_tokens") for result in results]
    assert computed[1] > computed[0]
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-6)


def test_sequences_without_advantage_are_measured_but_not_trained() -> None:
    batch = random_batch(3, 4, vocab=VOCAB)
    for advantages in batch.advantages[:4]:
        advantages[:] = 0
    trainer, metrics = trainer_of(), TokenMetrics()
    expected = plain_gradient(trainer.model, batch)
    trainer.accumulate(batch, LOSS, metrics)
    assert metrics.num_tokens == sum(len(t.response_ids) for t in batch.trajectories)
    for parameter, want in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, atol=2e-5, rtol=1e-4)


def test_a_batch_without_any_advantage_has_no_gradient() -> None:
    batch = random_batch(2, 2, vocab=VOCAB)
    for advantages in batch.advantages:
        advantages[:] = 0
    trainer, metrics = trainer_of(), TokenMetrics()
    assert not trainer.accumulate(batch, LOSS, metrics)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert metrics.num_tokens > 0


def test_mismatch_figures_are_those_of_the_logprobs() -> None:
    trainer, batch = trainer_of(), random_batch(2, 3, vocab=VOCAB)
    metrics = TokenMetrics()
    trainer.accumulate(batch, LOSS, metrics)
    ours = np.concatenate(trainer.logprobs(batch.trajectories))
    rollout = np.concatenate([t.rollout_logprobs for t in batch.trajectories])
    got = metrics.result()
    prefix = "sampling/sampling_logp_difference"
    assert got[f"{prefix}/mean"] == pytest.approx(np.abs(ours - rollout).mean(), rel=1e-4)
    assert got[f"{prefix}/max"] == pytest.approx(np.abs(ours - rollout).max(), rel=1e-4)
    ratio = ours - rollout
    assert got["rollout_corr/k3_kl"] == pytest.approx(
        float((np.expm1(ratio) - ratio).mean()), rel=1e-3
    )


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    trainer, batch = trainer_of(), random_batch(1, 1, vocab=VOCAB)
    metrics = TokenMetrics()
    trainer.accumulate(batch, LOSS, metrics)
    (t,) = batch.trajectories
    ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids])).long()
    with torch.no_grad():
        logits = trainer.model(ids[None]).logits[0, len(t.prompt_ids) - 1 : -1] / TEMPERATURE
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert metrics.result()["entropy"] == pytest.approx(float(expected), rel=1e-4)


def test_a_step_clips_the_gradient_and_uses_the_rate() -> None:
    batch = random_batch(2, 3, vocab=VOCAB)
    trainer = trainer_of(max_grad_norm=1e-3)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    norm = torch.stack([g.norm() for g in plain_gradient(trainer.model, batch)]).norm()
    trainer.accumulate(batch, LOSS, TokenMetrics())
    assert trainer.step(lr=1e-2) == pytest.approx(float(norm), rel=1e-3)
    moved = max(
        float((p.detach() - b).abs().max())
        for p, b in zip(trainer.model.parameters(), before, strict=True)
    )
    assert moved == pytest.approx(1e-2, rel=0.05)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_reference_stays_where_the_model_was() -> None:
    trainer, batch = trainer_of(), random_batch(2, 3, vocab=VOCAB)
    before = trainer.logprobs(batch.trajectories)
    trainer.accumulate(batch, LOSS, TokenMetrics())
    trainer.step(lr=1e-1)
    after = trainer.logprobs(batch.trajectories)
    reference = trainer.reference_logprobs(batch.trajectories)
    for b, r, a in zip(before, reference, after, strict=True):
        assert np.array_equal(b, r)
        assert not np.allclose(a, r)


def test_bfloat16_computes_in_it_and_keeps_float32_masters() -> None:
    batch = random_batch(2, 3, vocab=VOCAB)
    exact = trainer_of()
    rounded = Trainer(
        tiny_hf("llama", vocab_size=VOCAB, hidden_size=32, head_dim=8),
        OptimizerOptions(),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        temperature=TEMPERATURE,
    )
    pairs = zip(
        exact.logprobs(batch.trajectories), rounded.logprobs(batch.trajectories), strict=True
    )
    differences = np.concatenate([np.abs(a - b) for a, b in pairs])
    assert 0 < differences.max() < 0.2
    assert all(p.dtype == torch.bfloat16 for p in rounded.model.parameters())
    assert all(p.dtype == torch.float32 for p in rounded.masters.parameters)
    same_as_served = plain_logprobs(rounded.model, batch)
    for ours, theirs in zip(rounded.logprobs(batch.trajectories), same_as_served, strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), atol=0.05)


def test_microbatches_of_bfloat16_add_up_in_float32_and_steps_are_rounded_once() -> None:
    batch = random_batch(3, 3, vocab=VOCAB)
    trainers = [
        Trainer(
            tiny_hf("llama", vocab_size=VOCAB, hidden_size=32, head_dim=8),
            OptimizerOptions(max_tokens_per_microbatch=budget),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            temperature=TEMPERATURE,
        )
        for budget in (4096, 12)
    ]
    for trainer in trainers:
        assert trainer.accumulate(batch, LOSS, TokenMetrics())
        grads = [p.grad for p in trainer.masters.parameters]
        assert all(g is not None and g.dtype == torch.float32 for g in grads)
        assert all(p.grad is None for p in trainer.model.parameters())
        trainer.step(lr=1e-3)
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, trainer.masters.state()[name].bfloat16()), name


def test_every_loss_input_is_aligned_with_its_token() -> None:
    trainer, batch = trainer_of(budget=12), random_batch(3, 3, vocab=VOCAB)
    seen: list[LossInputs] = []

    def watch(inputs: LossInputs) -> LossOutput:
        seen.append(inputs)
        return LOSS(inputs)

    trainer.accumulate(batch, watch, TokenMetrics())
    lengths = [len(t.response_ids) for t in batch.trajectories]
    flat = {
        "advantages": np.concatenate(batch.advantages),
        "weights": np.repeat(batch.weights, lengths),
        "rollout": np.concatenate([t.rollout_logprobs for t in batch.trajectories]),
    }
    for name, expected in flat.items():
        got = np.concatenate([getattr(inputs, name).numpy() for inputs in seen])
        assert np.array_equal(got, expected), name


def test_gradients_of_float16_are_unscaled_as_they_become_float32() -> None:
    """Over several micro-batches, and from a scale at which they would otherwise be zero."""
    batch = ranks.batch(0)
    exact, half = ranks.plain(), ranks.plain(torch.float16)
    assert half.loss_scale is not None
    for scale in (2.0**16, 2.0**12):
        half.loss_scale.value = scale
        for trainer in (exact, half):
            trainer.optimizer.zero_grad()
            assert trainer.accumulate(batch, ranks.small_loss, TokenMetrics())
        for want, got in zip(exact.masters.parameters, half.masters.parameters, strict=True):
            assert want.grad is not None and got.grad is not None
            assert got.grad.dtype == torch.float32
            torch.testing.assert_close(
                got.grad, want.grad, rtol=0, atol=0.02 * float(want.grad.abs().max())
            )
        assert all(p.grad is None for p in half.model.parameters())


def test_an_overflow_changes_nothing_but_the_scale_and_a_resumed_run_goes_on_alike(
    tmp_path: Path,
) -> None:
    build = functools.partial(ranks.plain, torch.float16)
    seen = ranks.skipped(build, World(), tmp_path)
    assert seen["norm"] == 0.0
    assert seen["scales"] == [(FIRST, 0), (FIRST / 2, 1), (FIRST / 2, 1)]
    assert np.array_equal(*seen["logprobs"])
    assert seen["rows"][0] == seen["rows"][1] and seen["rows"][0][0]["grad_norm"] > 0
    assert np.array_equal(*seen["after"])
    assert not np.array_equal(seen["after"][0], seen["logprobs"][0])


def test_the_optimizer_does_not_see_a_step_that_is_skipped() -> None:
    """Its moments and its count of steps are those of a run without the overflow."""
    plain, broken = (ranks.plain(torch.float16) for _ in range(2))
    for trainer, losses in (
        (plain, [ranks.small_loss] * 2),
        (broken, [ranks.small_loss, ranks.overflowing_loss, ranks.small_loss]),
    ):
        for loss in losses:
            trainer.accumulate(ranks.batch(0), loss, TokenMetrics())
            trainer.step(1e-2)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (plain, broken)]
    for ours, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert ours["step"] == theirs["step"] == 2
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(theirs[key], ours[key], rtol=0.02, atol=1e-6)
    assert all(p.grad is None for p in broken.masters.parameters)


def test_a_gradient_that_overflows_at_every_scale_ends_the_run() -> None:
    trainer = ranks.plain(torch.float16)
    assert trainer.loss_scale is not None
    trainer.loss_scale.value = 2.0
    for _ in range(2):
        trainer.accumulate(ranks.batch(0), ranks.overflowing_loss, TokenMetrics())
        if trainer.loss_scale.value > 1:
            assert trainer.step(1e-2) == 0.0
            continue
        with pytest.raises(NonFiniteGradient, match="float16"):
            trainer.step(1e-2)
