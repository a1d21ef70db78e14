"""Made-up trajectories with shared prefixes, for tests of batches and trainers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.protocol import FloatArray
from recipes.types import Batch, Group, Problem, Trajectory


def trajectory(
    prompt: np.ndarray, response: list[int], reward: float = 0.0, logprob: float = -1.0
) -> Trajectory:
    return Trajectory(
        prompt_ids=prompt,
        response_ids=np.array(response, np.int32),
        rollout_logprobs=np.full(len(response), logprob, np.float32),
        spans=(),
        text="",
        truncated=False,
        reward=reward,
        correct=reward,
    )


def random_groups(num_groups: int, samples: int, *, vocab: int, seed: int = 0) -> list[Group]:
    """Groups whose prompts share a prefix, as few-shot prompts do; responses of 1 to 4 tokens."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, vocab, 6)
    groups = []
    for _ in range(num_groups):
        own = rng.integers(0, vocab, rng.integers(1, 4))
        prompt = np.concatenate([shared, own]).astype(np.int32)
        replies = [rng.integers(0, 3, rng.integers(1, 5)).tolist() for _ in range(samples)]
        trajectories = tuple(
            trajectory(prompt, reply, float(rng.integers(0, 2)), float(-rng.random()))
            for reply in replies
        )
        problem = Problem(question="", answer="", key="")
        groups.append(Group(problem=problem, trajectories=trajectories))
    return groups


def random_batch(num_groups: int, samples: int, *, vocab: int, seed: int = 0) -> Batch:
    """A batch with random advantages and weights."""
    groups = random_groups(num_groups, samples, vocab=vocab, seed=seed)
    trajectories = tuple(t for group in groups for t in group.trajectories)
    rng = np.random.default_rng(seed + 1)

    def draw() -> FloatArray:
        return rng.standard_normal(len(trajectories)).astype(np.float32)

    return Batch(
        trajectories=trajectories,
        advantages=per_token(trajectories, draw()),
        weights=np.abs(draw()),
    )


def per_token(
    trajectories: Sequence[Trajectory], values_N: Sequence[float] | FloatArray
) -> tuple[FloatArray, ...]:
    """The value of each sequence on each of its response tokens."""
    pairs = zip(trajectories, values_N, strict=True)
    return tuple(np.full(len(t.response_ids), value, dtype=np.float32) for t, value in pairs)
