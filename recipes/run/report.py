"""One step as a row of named figures. Names follow TRL's and verl's where those exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.algorithms.values import explained_variance
from recipes.types import Batch, Group, Trajectory
from trainer_bridge import PushReport

PHASES = ("generate", "score", "sleep", "train", "push", "other")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Rollouts of one step. `sampled`: every group; `groups`: those to train on."""

    groups: list[Group]
    sampled: list[Group]


def rollout_figures(
    sampled: Sequence[Group], seconds: dict[str, float], *, compares_group: bool = True
) -> dict[str, float]:
    """Rewards, lengths and speed of the rollouts of one step.

    compares_group: whether replies are judged by others to the same problem. Otherwise all of the
    step are judged by each other: `reward_std` is theirs, and a step has no spread or has some.
    A step without a graded reply has no `reward`, and one in which no group became whole, as an
    asynchronous run may have, only says so.
    """
    trajectories = [t for group in sampled for t in group.trajectories]
    if not trajectories:
        return {"perf/rollout_tokens": 0.0, "perf/rollout_tokens_per_s": 0.0}
    lengths = np.array([len(t.response_ids) for t in trajectories])
    rewards = [group.rewards for group in sampled if len(group.rewards)]
    mixed = [group.mixed for group in sampled]
    if not compares_group:
        rewards = [np.concatenate(rewards)] if rewards else []
        mixed = [bool(rewards) and bool(rewards[0].max() > rewards[0].min())]
    spreads = [float(graded.std(ddof=1)) for graded in rewards if len(graded) > 1]
    greedy = [group.greedy for group in sampled if group.greedy is not None]
    told = [t.reward for t in greedy if not t.failed]
    num_sampled = int(lengths.sum()) + sum(len(t.response_ids) for t in greedy)
    figures = {
        **({"reward": float(np.concatenate(rewards).mean())} if rewards else {}),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": float(np.mean(np.logical_not(mixed))),
        "frac_groups_all_wrong": _mean([not _any_right(g) for g in sampled if g.graded]),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean([t.truncated for t in trajectories])),
        "perf/rollout_tokens": float(num_sampled),
        "perf/rollout_tokens_per_s": float(num_sampled / max(seconds["generate"], 1e-9)),
    }
    if told:
        figures["reward_greedy"] = _mean(told)
    return figures | spec_figures([*trajectories, *greedy])


def spec_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What came of the drafts for replies; nothing where none were drafted. accept_length: tokens
    of a reply in a step that verified drafts of it. drafted: tokens drafted for a token sampled."""
    told = [t.spec for t in trajectories if t.spec is not None]
    if not told:
        return {}
    verifies = sum(counts.verifies for counts in told)
    drafted, accepted = sum(c.drafted for c in told), sum(c.accepted for c in told)
    num_sampled = sum(len(t.response_ids) for t in trajectories)
    return {
        "speculative/accept_length": 1 + accepted / verifies if verifies else 1.0,
        "speculative/accept_rate": accepted / drafted if drafted else 0.0,
        "speculative/drafted": drafted / max(num_sampled, 1),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _any_right(group: Group) -> bool:
    return any(trajectory.correct > 0 for trajectory in group.trajectories)


def value_figures(batch: Batch) -> dict[str, float]:
    """How well the critic foresaw what the replies of a batch earned; verl's names. Nothing without
    a critic, or without a reply."""
    if not batch.values or not batch.returns:
        return {}
    values_K, returns_K = np.concatenate(batch.values), np.concatenate(batch.returns)
    return {
        "critic/vf_explained_var": explained_variance(values_K, returns_K),
        "critic/vpred_mean": float(values_K.mean()),
        "critic/returns/mean": float(returns_K.mean()),
    }


def push_figures(report: PushReport) -> dict[str, float]:
    """What publishing the weights cost, beside a plain copy of the same bytes if measured."""
    figures = {
        "weight_version": float(report.version),
        "push/seconds": report.seconds,
        "push/num_bytes": float(report.num_bytes),
    }
    if report.memcpy_seconds is not None:
        figures["push/memcpy_seconds"] = report.memcpy_seconds
    return figures


def time_figures(seconds: dict[str, float]) -> dict[str, float]:
    """The ledger of one step: the phases, and their sum, which is its wall time."""
    figures = {f"timing_s/{phase}": seconds.get(phase, 0.0) for phase in PHASES}
    return {**figures, "timing_s/step": sum(seconds.values())}
