"""What a run that learns nothing is told."""

from __future__ import annotations

import pytest

from recipes.algorithms.presets import AlgorithmName, preset
from recipes.run.advice import WINDOW
from recipes.run.advice import advice as advice_to


def advice(rows: list[dict[str, float]], algorithm: AlgorithmName = "grpo") -> str:
    return advice_to(rows, preset(algorithm, 8))


def rows(**figures: float) -> list[dict[str, float]]:
    row = {"frac_reward_zero_std": 0.95, "frac_groups_all_wrong": 0.3, "reward": 0.4}
    return [row | {"entropy": 0.01, "completions/clipped_ratio": 0.0} | figures] * WINDOW


def test_a_collapse_is_named_with_its_entropy_and_what_to_try() -> None:
    told = advice(rows())
    assert told.startswith("collapsed: in 95% of the groups")
    assert "entropy 0.010" in told and "--algorithm dapo" in told


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++"])
def test_what_compares_no_samples_of_a_problem_is_told_of_whole_steps(
    algorithm: AlgorithmName,
) -> None:
    told = advice(rows(frac_reward_zero_std=1.0), algorithm)
    assert told.startswith("collapsed: in 100% of the steps")
    assert "--prompts-per-step" in told and "--warmup-steps" in told
    assert "--samples" not in told and "--algorithm" not in told
    wrong = advice(rows(frac_reward_zero_std=1.0, frac_groups_all_wrong=1.0, reward=0), algorithm)
    assert wrong.startswith("no sample is right") and "--samples" not in wrong


def test_what_a_run_does_already_is_no_advice() -> None:
    told = advice(rows(), "dapo")
    assert "--algorithm" not in told and "more --samples" in told


def test_rewards_without_spread_are_no_matter_where_a_teacher_is_learned_from() -> None:
    assert advice(rows(), "opd") == ""
    skipped = [r | {"train/skipped_steps": float(n)} for n, r in enumerate(rows())]
    assert advice([r | {"train/loss_scale": 1.0} for r in skipped], "opd")


def test_a_task_without_any_right_answer_is_named() -> None:
    told = advice(rows(frac_groups_all_wrong=0.97, reward=0.01))
    assert told.startswith("no sample is right in 97% of the groups")
    assert "max-new-tokens" not in told
    cut = advice(rows(frac_groups_all_wrong=0.97, reward=0.01) + rows(frac_groups_all_wrong=1.0))
    assert cut.startswith("no sample is right in 100%")
    assert "--max-new-tokens" in advice(
        [r | {"completions/clipped_ratio": 0.9} for r in rows(frac_groups_all_wrong=1.0, reward=0)]
    )


def test_a_run_that_learns_or_has_learned_is_left_alone() -> None:
    assert advice(rows(frac_reward_zero_std=0.6)) == ""
    assert advice(rows(reward=0.95, frac_groups_all_wrong=0.0)) == ""
    assert advice(rows()[:-1]) == ""


def test_a_loss_scale_that_keeps_falling_is_told() -> None:
    def skipping(*totals: float) -> list[dict[str, float]]:
        learns = rows(frac_reward_zero_std=0.1)[0]
        return [learns | {"train/skipped_steps": n, "train/loss_scale": 64.0} for n in totals]

    told = advice(skipping(2, 3, 3, 4, 5))
    assert told.startswith("3 of the last optimizer steps were skipped")
    assert "down to 64" in told and "--dtype bfloat16" in told
    assert advice(skipping(2, 3, 3, 4, 4)) == ""
