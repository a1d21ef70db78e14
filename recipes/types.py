"""What flows through a recipe: a problem, its sampled replies, and the batch to train on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from engine.protocol import FloatArray, IntArray, RequestOutput, SpecCounts, VersionSpan

T = TypeVar("T")

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

Message = dict[str, Any]
"""One chat message: {"role": ..., "content": ...}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One task instance, e.g. Problem(question="Largest of 3, 17, 5?", answer="17", key="3 5 17").

    key: canonical form; problems with equal keys are the same problem in other words, and the
    key alone decides whether a problem is for training or held out.
    chat: the conversation that asks it; without one, the question is the user's turn.
    columns: what else its source says of it, for rewards.
    """

    question: str
    answer: str
    key: str
    chat: tuple[Message, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldRoutes:
    """Where the experts that a reply's tokens went to are kept (`trainers/route_shelf.py`).

    owner: rank of the process. key: in its shelf. shape: all tokens but the last, decoder layers,
    experts of a token. dtype: uint8 or uint16, whose largest number says that there is no route.
    """

    owner: int
    key: int
    shape: tuple[int, int, int]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One sampled reply, token by token, never re-tokenised.

    prompt_ids: int32 [prompt_len]; the same object for all samples of a group.
    response_ids: int32 [response_len], the stop token included if one was sampled.
    rollout_logprobs: float32 [response_len], log_softmax(logits / temperature) in the engine.
    spans: weight versions that sampled the response.
    truncated: the reply was cut by the token limit.
    failed: why it could not be graded, "kind: reason" (`rewards.base.Failed`), or "". A failed
        sample has no part in its group's statistics nor in the loss; its reward and `correct` are
        0 and mean nothing.
    spec: what the engine drafted for it; None of one that drafts nothing.
    routes: the experts that its tokens went to, where they are to be replayed.
    entropies: float32 [response_len], nats, of what each token was drawn from; None where nobody
        asked.
    """

    prompt_ids: IntArray
    response_ids: IntArray
    rollout_logprobs: FloatArray
    spans: tuple[VersionSpan, ...]
    text: str
    truncated: bool
    reward: float
    correct: float
    failed: str = ""
    spec: SpecCounts | None = None
    routes: HeldRoutes | None = None
    entropies: FloatArray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The samples of one problem; their rewards are compared with each other.

    greedy: the likeliest reply to it, where the samples are compared with that one; it is not
        trained on.
    position: place of the problem in the training stream, where groups do not end in that order.
    """

    problem: Problem
    trajectories: tuple[Trajectory, ...]
    greedy: Trajectory | None = None
    position: int = -1

    @property
    def graded(self) -> tuple[Trajectory, ...]:
        """The samples that have a reward."""
        return tuple(t for t in self.trajectories if not t.failed)

    @property
    def rewards(self) -> FloatArray:
        """float32 [S'], one reward a graded sample."""
        return np.array([t.reward for t in self.graded], dtype=np.float32)

    @property
    def mixed(self) -> bool:
        """Whether the rewards differ, from that of the greedy reply if there is one: a group
        without spread has zero advantage."""
        rewards = self.rewards
        if self.greedy is not None and not self.greedy.failed:
            rewards = np.append(rewards, np.float32(self.greedy.reward))
        return len(self.graded) > 0 and bool(rewards.max() > rewards.min())


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedGroup:
    """A group whose replies are not all whole, taken from its engine to go on later.

    position: as in `Group`. seed, index: of the round that it began in, and its place there; they
        make its requests again (`collecting.collect.requests_of`).
    outputs: what there is of each reply that has begun, by request id. One that is over has its
        finish; the others have the tokens so far, each with its logprob and version.
    """

    position: int
    seed: int
    index: int
    problem: Problem
    outputs: dict[str, RequestOutput]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences of one optimizer update.

    advantages: N arrays float32 [response_len], of each response token.
    weights: float32 [N], weight of each token of a sequence in the loss. They are computed
        over the whole update, so the gradient does not depend on how it is cut into
        micro-batches.
    old_logprobs: N arrays float32 [response_len] of the policy before the first update on this
        data, or None when this is the first and only update (old is then the current policy).
    stale: bool [N]; sequences that older weights than the current ones sampled, at least in part.
        Their tokens are compared with the policy that sampled them. None says that none is.
    decoupled: those too are compared with `old_logprobs`.
    kept: N arrays bool [response_len]; tokens that are not kept have no part in the loss, and none
        in the averages behind `weights`. None keeps all.
    reference_logprobs: as `old_logprobs`, of the frozen reference model; None without a KL in the
        loss.
    token_rewards: N arrays float32 [response_len], what each token earned: the score of the reply
        is on its last one, a KL in the reward on all. The advantages come from them.
    values, returns: N arrays float32 [response_len]: of the state before each token, by the critic
        before its first update on this data, and what the critic learns; None without a critic.
    """

    trajectories: tuple[Trajectory, ...]
    advantages: tuple[FloatArray, ...]
    weights: FloatArray
    old_logprobs: tuple[FloatArray, ...] | None = None
    reference_logprobs: tuple[FloatArray, ...] | None = None
    stale: BoolArray | None = None
    kept: tuple[BoolArray, ...] | None = None
    token_rewards: tuple[FloatArray, ...] | None = None
    values: tuple[FloatArray, ...] | None = None
    returns: tuple[FloatArray, ...] | None = None
    decoupled: bool = False

    @property
    def learns(self) -> BoolArray:
        """bool [N]: sequences with a gradient, which those without advantage have of a KL or of a
        value loss alone."""
        all_do = self.reference_logprobs is not None or self.returns is not None
        return np.array([all_do or bool(a.any()) for a in self.advantages], dtype=np.bool_)

    def select(self, indices: list[int]) -> Batch:
        """The sub-batch of these sequences, weights unchanged."""

        def pick(arrays: tuple[T, ...] | None) -> tuple[T, ...] | None:
            return None if arrays is None else tuple(arrays[i] for i in indices)

        return Batch(
            trajectories=tuple(self.trajectories[i] for i in indices),
            advantages=tuple(self.advantages[i] for i in indices),
            weights=self.weights[indices],
            old_logprobs=pick(self.old_logprobs),
            reference_logprobs=pick(self.reference_logprobs),
            stale=None if self.stale is None else self.stale[indices],
            kept=pick(self.kept),
            token_rewards=pick(self.token_rewards),
            values=pick(self.values),
            returns=pick(self.returns),
            decoupled=self.decoupled,
        )
