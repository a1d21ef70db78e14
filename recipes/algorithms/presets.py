"""The algorithms by name, each a row of choices, and the options that override a row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from recipes.algorithms.advantages import GROUP_ESTIMATORS, AdvantageEstimator
from recipes.algorithms.aggregation import LossAggregation
from recipes.algorithms.controllers import KLController
from recipes.algorithms.importance import ImportanceLevel, ImportanceMode
from recipes.algorithms.kl import KLEstimator

PolicyLoss = Literal["clip", "sequence_clip", "cispo", "dppo"]
KLPlace = Literal["loss", "reward"]
ReferencePlace = Literal["copy", "host", "engine"]
AlgorithmName = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce++",
    "reinforce++-baseline",
    "remax",
    "opd",
    "dppo",
    "ppo",
]


@dataclass(frozen=True, kw_only=True)
class AlgorithmOptions:
    """Which algorithm, and what to change of it. None takes the algorithm's own choice."""

    algorithm: AlgorithmName = "dapo"
    """Sets the defaults of the options below; docs/trainers.md has a table. DAPO, which replaces
    groups that all agree, is the one that learns from every seed."""
    clip_low: float | None = None
    """Lower clip range of the probability ratio (clips below 1 - clip_low)."""
    clip_high: float | None = None
    """Upper clip range of the probability ratio (clips above 1 + clip_high)."""
    loss_aggregation: LossAggregation | None = None
    """How token losses are averaged; verl's names."""
    dynamic_sampling: bool | None = None
    """Drop groups whose rewards are all equal and sample others in their place (DAPO)."""
    max_resamples: int = 3
    """Most extra rounds of generation a step for dynamic sampling."""
    overlong_buffer: int | None = None
    """Last tokens before the length limit over which a penalty grows from 0 to 1; 0 is off."""
    num_iterations: int = 1
    """Epochs over each batch (GRPO's mu); above 1 the ratio is clipped for real."""
    num_minibatches: int = 1
    """Optimizer updates each epoch is cut into."""
    gamma: float = 1.0
    """Discount of what is earned a token later."""
    whiten_advantages: bool | None = None
    """Give the advantages of an update's tokens mean 0 and deviation 1."""
    normalise_rewards: bool = False
    """Take rewards as deviations from the mean of all rewards of the run so far."""
    kl_coef: float = 0.0
    """Weight of the KL to the initial model; above 0 a frozen copy of it is kept."""
    kl_estimator: KLEstimator | None = None
    """Estimator of that KL; None takes k1 in the reward and the algorithm's own in the loss."""
    kl_in: KLPlace | None = None
    """Where the KL is subtracted: from the reward of each token, or as a term of the loss."""
    reference: ReferencePlace = "copy"
    """Where that initial model is: beside the trainer; in host memory, and beside the trainer only
    while it is used; or in an engine and a process of its own."""
    kl_controller: KLController = "fixed"
    """Keep that weight, or change it so that the KL stays near --kl-target."""
    kl_target: float = 6.0
    """KL of a whole reply that the adaptive controller aims at, in nats."""
    kl_horizon: float = 10_000.0
    """Replies over which the adaptive controller changes the weight by a fifth, at most."""
    is_level: ImportanceLevel = "none"
    """Correct the difference between the policy that sampled and the one that learns by importance
    weights: of a token, of its whole reply, or the geometric mean over the reply."""
    is_mode: ImportanceMode = "truncate"
    """What happens to a weight beyond the cap: cut to it ('truncate'); its tokens leave the loss
    and its averages ('mask'); or they weigh nothing and are counted ('zero')."""
    is_cap: float = 2.0
    """Largest importance weight."""
    is_floor: float | None = None
    """Smallest weight of 'mask' and 'zero'; None takes 1/cap, and 0."""
    is_max_k3: float | None = None
    """Leave out of the loss replies whose KL between rollout and trainer, by k3 over their tokens,
    is larger; None leaves out none."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm with every choice made; see `AlgorithmOptions` for the fields."""

    advantage: AdvantageEstimator
    policy_loss: PolicyLoss
    clip_low: float
    clip_high: float
    loss_aggregation: LossAggregation
    dynamic_sampling: bool = False
    max_resamples: int = 3
    overlong_buffer: int = 0
    num_iterations: int = 1
    num_minibatches: int = 1
    gamma: float = 1.0
    gae_lambda: float = 1.0
    whiten_advantages: bool = False
    normalise_rewards: bool = False
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_in: KLPlace = "loss"
    kl_controller: KLController = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10_000.0
    is_level: ImportanceLevel = "none"
    is_mode: ImportanceMode = "truncate"
    is_cap: float = 2.0
    is_floor: float | None = None
    is_max_k3: float | None = None
    decoupled: bool = False
    """Replies of older weights are compared with the policy before the update, and weighted by how
    that differs from the one that sampled them; else with the one that sampled them."""

    @property
    def rejects(self) -> bool:
        """Whether tokens beyond the cap leave the loss altogether."""
        masks = self.is_level != "none" and self.is_mode == "mask"
        return masks or self.is_max_k3 is not None

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy before the first update has to be known before the loss is."""
        several = self.num_iterations * self.num_minibatches > 1
        return several or self.rejects or self.rewards_kl or self.decoupled

    @property
    def compares_group(self) -> bool:
        """Whether a reply is judged by the others to its problem."""
        return self.advantage in GROUP_ESTIMATORS

    @property
    def compares_problem(self) -> bool:
        """Whether a reply is judged by others to its problem, be it the greedy one."""
        return self.compares_group or self.needs_greedy

    @property
    def needs_greedy(self) -> bool:
        """Whether a reply is judged by the greedy one to its problem."""
        return self.advantage == "greedy_baseline"

    @property
    def distils(self) -> bool:
        """Whether a teacher judges each token, in place of the reward."""
        return self.advantage == "teacher"

    @property
    def rewards_kl(self) -> bool:
        """Whether the reward of a token has the KL to the reference in it."""
        return self.kl_coef > 0 and self.kl_in == "reward"


def preset(name: AlgorithmName, max_new_tokens: int) -> Algorithm:
    """The published choices of an algorithm; the papers are cited at the losses and estimators.

    DAPO's buffer is a fifth of the longest reply, as in its paper. CISPO bounds the ratio only
    from above, at 5 (ScaleRL, arXiv 2510.13786). Raises ValueError for another name.
    """
    grpo = Algorithm(
        advantage="group_norm",
        policy_loss="clip",
        clip_low=0.2,
        clip_high=0.2,
        loss_aggregation="seq-mean-token-mean",
    )
    change = dataclasses.replace
    if name == "grpo":
        return grpo
    if name == "dr_grpo":
        return change(grpo, advantage="group_mean", loss_aggregation="seq-mean-token-sum-norm")
    if name == "dapo":
        return change(
            grpo,
            clip_high=0.28,
            loss_aggregation="token-mean",
            dynamic_sampling=True,
            overlong_buffer=max_new_tokens // 5,
        )
    if name == "gspo":
        return change(grpo, policy_loss="sequence_clip", clip_low=3e-4, clip_high=4e-4)
    if name == "cispo":
        return change(
            grpo, policy_loss="cispo", clip_low=1.0, clip_high=4.0, loss_aggregation="token-mean"
        )
    if name == "rloo":
        return change(grpo, advantage="leave_one_out", loss_aggregation="seq-mean-token-sum")
    if name == "remax":
        return change(grpo, advantage="greedy_baseline", loss_aggregation="seq-mean-token-sum")
    if name == "opd":
        return change(grpo, advantage="teacher", loss_aggregation="token-mean")
    if name == "dppo":
        return change(
            grpo, advantage="group_mean", policy_loss="dppo", loss_aggregation="token-mean"
        )
    if name in ("reinforce++", "ppo"):
        return change(
            grpo,
            advantage="gae" if name == "ppo" else "return_to_go",
            loss_aggregation="token-mean",
            whiten_advantages=True,
            kl_in="reward",
            kl_estimator="k1",
        )
    if name == "reinforce++-baseline":
        return change(
            grpo,
            advantage="group_mean",
            loss_aggregation="token-mean",
            whiten_advantages=True,
            kl_estimator="k2",
        )
    raise ValueError(f"unknown algorithm {name!r}")


def resolve(options: AlgorithmOptions, max_new_tokens: int) -> Algorithm:
    """The preset with every option that was given put over it.

    A KL that is moved takes an estimator that is right there: in the reward k1, which has no bias;
    in the loss k3, since the gradient of k1 says nothing.
    """
    own = preset(options.algorithm, max_new_tokens)
    known = {field.name for field in dataclasses.fields(Algorithm)}
    given = {
        field.name: value
        for field in dataclasses.fields(options)
        if field.name in known and (value := getattr(options, field.name)) is not None
    }
    if options.kl_in not in (None, own.kl_in):
        given = {"kl_estimator": "k1" if options.kl_in == "reward" else "k3"} | given
    return dataclasses.replace(own, **given)
