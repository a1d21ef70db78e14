"""Each loss against a hand-written reference, one token at a time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from recipes.algorithms.losses import LossInputs, policy_loss
from recipes.algorithms.presets import Algorithm, preset

LOGPROBS = [-1.0, -0.2, -2.0, -0.7, -0.4]
OLD = [-1.5, -0.9, -1.2, -0.7, -0.5]
ROLLOUT = [-1.4, -0.9, -1.3, -0.6, -0.5]
REFERENCE = [-1.1, -0.3, -1.8, -0.9, -0.1]
ADVANTAGES = [1.0, 1.0, -2.0, -2.0, -2.0]
WEIGHTS = [0.25, 0.25, 0.125, 0.125, 0.125]
SEQUENCE = [0, 0, 1, 1, 1]


def inputs(*, reference: bool = False) -> LossInputs:
    return LossInputs(
        logprobs=torch.tensor(LOGPROBS, requires_grad=True),
        old=torch.tensor(OLD),
        rollout=torch.tensor(ROLLOUT),
        reference=torch.tensor(REFERENCE) if reference else None,
        advantages=torch.tensor(ADVANTAGES),
        weights=torch.tensor(WEIGHTS),
        sequence=torch.tensor(SEQUENCE),
        num_sequences=2,
    )


def ppo_reference(low: float, high: float) -> float:
    total = 0.0
    for new, old, advantage, weight in zip(LOGPROBS, OLD, ADVANTAGES, WEIGHTS, strict=True):
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - low), 1 + high)
        total -= weight * min(ratio * advantage, clipped * advantage)
    return total


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_clipped_losses(name: str) -> None:
    algorithm = preset(name, 8)  # type: ignore[arg-type]
    got = policy_loss(inputs(), algorithm)
    assert float(got.loss.detach()) == pytest.approx(
        ppo_reference(algorithm.clip_low, algorithm.clip_high), rel=1e-5
    )


def test_clipped_tokens_lose_their_gradient_and_are_counted() -> None:
    given = inputs()
    got = policy_loss(given, preset("grpo", 8))
    got.loss.backward()
    assert given.logprobs.grad is not None
    # Ratios: e^0.5 and e^0.7 above 1.2 with a > 0; e^-0.8 below 0.8 with a < 0.
    assert got.clipped_high.tolist() == [True, True, False, False, False]
    assert got.clipped_low.tolist() == [False, False, True, False, False]
    assert (given.logprobs.grad == 0).tolist() == [True, True, True, False, False]


def test_gspo_has_one_ratio_a_sequence() -> None:
    algorithm = dataclasses.replace(preset("gspo", 8), clip_low=0.9, clip_high=9.0)
    given = inputs()
    loss = policy_loss(given, algorithm).loss
    ratios = [math.exp((0.5 + 0.7) / 2), math.exp((-0.8 + 0.0 + 0.1) / 3)]
    expected = -sum(
        w * a * ratios[s] for w, a, s in zip(WEIGHTS, ADVANTAGES, SEQUENCE, strict=True)
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, given.logprobs)
    per_token = [-w * a * ratios[s] for w, a, s in zip(WEIGHTS, ADVANTAGES, SEQUENCE, strict=True)]
    assert gradient.tolist() == pytest.approx(per_token, rel=1e-5)


def test_gspo_clips_whole_sequences() -> None:
    got = policy_loss(inputs(), preset("gspo", 8))
    assert got.clipped_high.tolist() == [True, True, False, False, False]
    assert got.clipped_low.tolist() == [False, False, True, True, True]


def test_cispo_keeps_every_gradient_with_a_bounded_weight() -> None:
    algorithm = dataclasses.replace(preset("cispo", 8), clip_high=0.8)
    given = inputs()
    loss = policy_loss(given, algorithm).loss
    ratios = [min(math.exp(n - o), 1.8) for n, o in zip(LOGPROBS, OLD, strict=True)]
    terms = list(zip(WEIGHTS, ratios, ADVANTAGES, LOGPROBS, strict=True))
    assert float(loss.detach()) == pytest.approx(
        -sum(w * r * a * n for w, r, a, n in terms), rel=1e-5
    )
    (gradient,) = torch.autograd.grad(loss, given.logprobs)
    assert gradient.tolist() == pytest.approx([-w * r * a for w, r, a, _ in terms], rel=1e-5)


def test_kl_is_added_per_token() -> None:
    algorithm = dataclasses.replace(preset("grpo", 8), kl_coef=0.3, kl_estimator="k3")
    without = float(policy_loss(inputs(), algorithm).loss.detach())
    got = policy_loss(inputs(reference=True), algorithm)
    expected = sum(
        w * (math.exp(r - n) - 1 - (r - n))
        for w, r, n in zip(WEIGHTS, REFERENCE, LOGPROBS, strict=True)
    )
    assert float(got.loss.detach()) - without == pytest.approx(0.3 * expected, rel=1e-4)
    assert got.kl is not None and not got.kl.requires_grad


def test_importance_correction_multiplies() -> None:
    algorithm = dataclasses.replace(preset("grpo", 8), is_level="token", is_cap=1.05)
    got = policy_loss(inputs(), algorithm)
    expected = [min(math.exp(o - r), 1.05) for o, r in zip(OLD, ROLLOUT, strict=True)]
    assert got.importance.tolist() == pytest.approx(expected)
    plain: Algorithm = preset("grpo", 8)
    assert float(got.loss.detach()) != pytest.approx(
        float(policy_loss(inputs(), plain).loss.detach())
    )


def test_on_policy_gradient_is_advantage_times_score() -> None:
    given = dataclasses.replace(inputs(), old=torch.tensor(LOGPROBS))
    (gradient,) = torch.autograd.grad(policy_loss(given, preset("grpo", 8)).loss, given.logprobs)
    expected = [-w * a for w, a in zip(WEIGHTS, ADVANTAGES, strict=True)]
    assert gradient.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("advantage", "cap", "expected"), [(1.0, 5.0, -1.61983), (-1.0, 5.0, 1.64872), (1.0, 1.3, 0.0)]
)
def test_a_decoupled_loss_by_hand(advantage: float, cap: float, expected: float) -> None:
    """lp -1, proximal -1.2, behaviour -1.5: w = e^.3 = 1.34986 beside a ratio of e^.2 = 1.22140,
    clipped at 1.2. Beyond the cap of w the token is out, and its weight in the average stays."""
    algorithm = dataclasses.replace(
        preset("grpo", 8), is_level="token", is_mode="zero", is_cap=cap, decoupled=True
    )
    given = LossInputs(
        logprobs=torch.tensor([-1.0], requires_grad=True),
        old=torch.tensor([-1.2]),
        rollout=torch.tensor([-1.5]),
        advantages=torch.tensor([advantage]),
        weights=torch.ones(1),
        sequence=torch.zeros(1, dtype=torch.int64),
        num_sequences=1,
    )
    assert float(policy_loss(given, algorithm).loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_dppo_by_hand() -> None:
    """Behaviour (.5, .5, .5, .01), now (.6, .8, .2, .5): moved by .1, .3, -.3 and .49."""
    now, then = [0.6, 0.8, 0.2, 0.5], [0.5, 0.5, 0.5, 0.01]
    advantages = [1.0, 1.0, -1.0, -1.0]
    given = LossInputs(
        logprobs=torch.tensor(now).log().requires_grad_(),
        old=torch.tensor(now).log(),
        rollout=torch.tensor(then).log(),
        advantages=torch.tensor(advantages),
        weights=torch.ones(4),
        sequence=torch.zeros(4, dtype=torch.int64),
        num_sequences=1,
    )
    got = policy_loss(given, preset("dppo", 8))
    # The second and third are beyond their side's 0.2; the last has a ratio of 50, cut to 8.
    squares = sum(math.log(a / b) ** 2 for a, b in zip(now, then, strict=True))
    assert float(got.loss.detach()) == pytest.approx(-1.2 + 8.0 + 1e-3 * squares, rel=1e-5)
    assert got.clipped_high.tolist() == [False, True, False, False]
    assert got.clipped_low.tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(got.loss, given.logprobs)
    pull = [2e-3 * math.log(a / b) for a, b in zip(now, then, strict=True)]
    assert gradient.tolist() == pytest.approx([pull[0] - 1.2, pull[1], pull[2], pull[3]], rel=1e-4)
