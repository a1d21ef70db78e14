"""From the groups of a step to the batch of its update, with the passes that its algorithm needs.

Called by the loops of `grpo.py` and `ppo.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from recipes.algorithms.controllers import adapted
from recipes.algorithms.distillation import mean_gap
from recipes.algorithms.presets import Algorithm
from recipes.collecting.batching import make_batch
from recipes.collecting.credit import graded, token_kl
from recipes.run.report import value_figures
from recipes.run.run import Run
from recipes.trainers.base import Logprobs, Values
from recipes.types import Batch, Group, Trajectory


def algorithm_now(run: Run) -> Algorithm:
    """The run's algorithm with the weight of the KL as it is at this step."""
    coef = run.progress.kl_coef
    return run.algorithm if coef is None else dataclasses.replace(run.algorithm, kl_coef=coef)


def prepare(
    run: Run, groups: Sequence[Group], algorithm: Algorithm
) -> tuple[Batch, dict[str, float]]:
    """The batch, and figures of the KL where it is in the reward, of that to the teacher, and of a
    critic's values; collective.

    algorithm: `algorithm_now`. Counts the rewards where they are normalised.
    """
    trajectories, trainer, moments = graded(groups), run.trainer, None
    if algorithm.normalise_rewards:
        moments = run.progress.reward_moments.including([t.reward for t in trajectories])
        run.progress.reward_moments = moments
    old = trainer.logprobs(trajectories) if algorithm.needs_old_logprobs else None
    reference = _reference_logprobs(run, trajectories) if algorithm.kl_coef > 0 else None
    teacher = None if run.teacher is None else run.teacher.logprobs(trajectories)
    figures: dict[str, float] = {}
    expected = None if run.critic is None else run.critic.values(trajectories)
    batch = make_batch(
        groups,
        algorithm,
        run.max_new_tokens,
        version=run.progress.step,
        old=old,
        reference=reference,
        moments=moments,
        teacher=teacher,
        values=None if expected is None else _as_rewards(run, expected),
    )
    if expected is not None:
        figures |= value_figures(batch)
        batch = _as_the_critic_counts(run, batch, expected)
    if teacher is not None:
        student = [t.rollout_logprobs for t in trajectories]
        figures["teacher_kl"] = mean_gap(teacher, student)
    if not algorithm.rewards_kl or old is None or reference is None:
        return batch, figures
    return batch, {**figures, "kl": _mean_kl(old, reference, algorithm)}


def _as_rewards(run: Run, expected: Values) -> Values:
    """What the critic expects, as rewards are counted."""
    assert run.critic is not None
    if not run.critic.normalises:
        return expected
    return tuple(map(run.progress.return_moments.from_units, expected))


def _as_the_critic_counts(run: Run, batch: Batch, expected: Values) -> Batch:
    """The batch with the values and returns that the critic says and learns: where it normalises,
    by the returns before this step's, which are counted then; the first step goes by its own."""
    assert run.critic is not None
    if not run.critic.normalises or not batch.trajectories:
        return batch
    assert batch.returns is not None
    before = run.progress.return_moments
    run.progress.return_moments = before.including(np.concatenate(batch.returns))
    moments = before if before.tells else run.progress.return_moments
    returns = tuple(map(moments.in_units, batch.returns))
    return dataclasses.replace(batch, values=expected, returns=returns)


def _reference_logprobs(run: Run, trajectories: tuple[Trajectory, ...]) -> Logprobs:
    if run.reference is not None:
        return run.reference.logprobs(trajectories)
    return run.trainer.reference_logprobs(trajectories)


def _mean_kl(old: Logprobs, reference: Logprobs, algorithm: Algorithm) -> float:
    """Over all tokens."""
    if not old:
        return 0.0
    return float(token_kl(np.concatenate(old), np.concatenate(reference), algorithm).mean())


def adapt_kl(
    run: Run, batch: Batch, algorithm: Algorithm, figures: dict[str, float]
) -> dict[str, float]:
    """The weight that the KL had in this update, by name; sets that of the next. Nothing without
    a KL. figures: of the update; "kl" is the mean over tokens."""
    if algorithm.kl_coef == 0:
        return {}
    num = len(batch.trajectories)
    if algorithm.kl_controller == "adaptive" and num:
        num_tokens = sum(len(t.response_ids) for t in batch.trajectories)
        run.progress.kl_coef = adapted(
            algorithm.kl_coef,
            figures["kl"] * num_tokens / num,
            target=algorithm.kl_target,
            horizon=algorithm.kl_horizon,
            num=num,
        )
    return {"kl_coef": algorithm.kl_coef}
